"""Saves a directory as the compile artifact of a key, and restores it where exactly that key is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cached_client.artifacts.archive import EXCLUDED, Archive
from cached_client.artifacts.environment import check_texts
from cached_client.artifacts.unpack import unpack
from cached_client.errors import IntegrityError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cached_client._proto import cached_pb2 as pb
    from cached_client.cache import Cache

_KEY_PATH = "key.json"


@dataclass(frozen=True, slots=True)
class Difference:
    """A field in which a key and that of an artifact differ; empty where one of them has no such field."""

    field: str
    wanted: str
    found: str

    def __str__(self) -> str:
        return f"{self.field}: wanted {self.wanted or 'nothing'}, found {self.found or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Restored:
    """An artifact was restored. ``added_files`` appeared in the directory, ``kept_files`` were there already.

    ``from_level``: where most of it came from: ``l1``, ``l2`` or ``l3`` (the destination).
    """

    name: str
    sha256: str
    size_bytes: int
    added_files: int
    kept_files: int
    seconds: float
    from_level: str


@dataclass(frozen=True, slots=True)
class Missed:
    """Nothing was restored. ``differences``: what the key of the nearest artifact has otherwise, if there is any."""

    name: str
    reason: str
    nearest: str = ""
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save.

    ``outcome``: ``stored``; ``same`` (it was there); ``other`` (another archive of this key is current, and stays);
    ``busy`` (somebody else is saving this key). ``sha256`` and ``size_bytes`` are those of this directory's archive.
    ``left_out``: links, overlong paths and the like, which are never saved.
    """

    name: str
    outcome: str
    sha256: str
    size_bytes: int
    files: int
    left_out: tuple[str, ...]
    seconds: float


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> tuple[Difference, ...]:
    """The fields in which two keys differ, by name."""
    names = sorted(wanted.keys() | found.keys())
    return tuple(
        Difference(name, wanted.get(name, ""), found.get(name, ""))
        for name in names
        if wanted.get(name, "") != found.get(name, "")
    )


def save(
    cache: Cache,
    directory: str | os.PathLike[str],
    key: Mapping[str, str],
    *,
    replaces: str = "",
    exclude: Sequence[str] = EXCLUDED,
    timeout_s: float | None = None,
) -> Saved:
    """Saves the regular files of a directory as the artifact of a key; the upload to the destination follows behind.

    The same content is no work. Other content under the same key stays as it is, unless ``replaces`` is its SHA-256:
    so of replicas that save at the same time one wins, and nobody undoes what he has not seen.

    Raises PermissionDeniedError where the daemon does not let this process save, ArtifactError for a directory that
    cannot be read or changes meanwhile, NoRoomError, InvalidRequestError (a key that is none, or too large an archive).
    """
    from cached_client._proto import cached_pb2 as pb
    from cached_client.descriptors import DescriptorClient, locate

    started_s = time.monotonic()
    check_texts(key)
    archive = Archive(Path(directory), exclude)
    sha256 = archive.sha256()
    connection = cache.connection
    request = pb.FindArtifactRequest(key=dict(key), local_only=True)
    found = connection.call(connection.stub.FindArtifact, request, timeout_s=timeout_s)
    outcome = _known_outcome(found, sha256, replaces)
    if not outcome:
        with DescriptorClient(locate(found.descriptor_socket, connection.path)) as descriptors:
            ticket = descriptors.ticket()
        offer = pb.ArtifactOffer(
            ticket=ticket, key=dict(key), size_bytes=archive.size_bytes, sha256=sha256, replaces_sha256=replaces
        )
        outcome = _put(cache, offer, archive, timeout_s)
    return Saved(
        name=found.name, outcome=outcome, sha256=sha256, size_bytes=archive.size_bytes, files=len(archive.members),
        left_out=archive.left_out, seconds=time.monotonic() - started_s,
    )  # fmt: skip


def _known_outcome(found: pb.FindArtifactResponse, sha256: str, replaces: str) -> str:
    """What would become of it, where that is known without sending anything."""
    if not found.HasField("artifact"):
        return ""
    if found.artifact.sha256 == sha256:
        return "same"
    return "" if found.artifact.sha256 == replaces else "other"


def _put(cache: Cache, offer: pb.ArtifactOffer, archive: Archive, timeout_s: float | None) -> str:
    from cached_client._proto import cached_pb2 as pb

    failed: list[Exception] = []

    def messages() -> Iterator[pb.PutArtifactRequest]:
        yield pb.PutArtifactRequest(offer=offer)
        try:
            for piece in archive.pieces():
                yield pb.PutArtifactRequest(data=piece)
        except Exception as error:
            failed.append(error)  # gRPC would only tell that something was wrong
            raise

    connection = cache.connection
    try:
        response = connection.call(connection.stub.PutArtifact, messages(), timeout_s=timeout_s)
    except Exception:
        if failed:
            raise failed[0] from None
        raise
    return str(pb.PutArtifactResponse.Outcome.Name(response.outcome)).removeprefix("OUTCOME_").lower()


def restore(
    cache: Cache, directory: str | os.PathLike[str], key: Mapping[str, str], *, timeout_s: float | None = None
) -> Restored | Missed:
    """Puts the files of the artifact of exactly this key into a directory; Missed where there is none.

    The daemon has verified the archive's SHA-256 before anything of it is used, and it is compared here once more, as
    are all fields of the key. How files come into the directory: see `unpack`; those that are there already stay.

    Raises IntegrityError for an artifact that is not what it should be, ArtifactError if the directory cannot be
    written, InvalidRequestError for a key that is none, and whatever keeps the daemon from finding or bringing it.
    """
    from cached_client._proto import cached_pb2 as pb

    started_s = time.monotonic()
    check_texts(key)
    connection = cache.connection
    found = connection.call(connection.stub.FindArtifact, pb.FindArtifactRequest(key=dict(key)), timeout_s=timeout_s)
    if not found.HasField("artifact"):
        return _missed(found, key)
    try:
        model = cache.attach(found.name, wait=True, timeout_s=timeout_s, client_name="cached artifact restore")
    except NotFoundError:
        return Missed(found.name, "it went away while it was looked for")
    with model:
        paths = set(model.files)
        _check_key(found.name, model.read(_KEY_PATH), key)
        archive_path = next((path for path in sorted(paths - {_KEY_PATH}) if path.endswith(".tar")), "")
        archive = model.view(archive_path, timeout_s)
        sha256 = hashlib.sha256(archive).hexdigest()
        if f"{sha256}.tar" != archive_path.rpartition("-")[2]:
            raise IntegrityError(
                f"the archive of {found.name} is not what its name says; nothing was restored",
                hint=f"remove it: cached artifact rm {found.name}", path=archive_path, check="sha256",
                expected=archive_path.rpartition("-")[2].removesuffix(".tar"), found=sha256,
            )  # fmt: skip
        added, kept = unpack(archive, Path(directory), max_bytes=len(archive))
        report = model.wait()
        return Restored(
            name=found.name, sha256=sha256, size_bytes=len(archive), added_files=added, kept_files=kept,
            seconds=time.monotonic() - started_s, from_level=report.from_level,
        )  # fmt: skip


def _missed(found: pb.FindArtifactResponse, key: Mapping[str, str]) -> Missed:
    where = f"neither here nor at {found.destination}" if found.destination else "none on this host"
    if not found.nearest:
        return Missed(found.name, f"there is no artifact at all, {where}" if found.destination else f"there is {where}")
    nearest = found.nearest[0]
    differing = differences(key, dict(nearest.key))
    return Missed(
        found.name,
        f"there is none of exactly this key, {where}; the nearest differs in {', '.join(d.field for d in differing)}",
        nearest.name,
        differing,
    )


def _check_key(name: str, document: bytes, key: Mapping[str, str]) -> None:
    """Field by field: what the daemon has under this name must be for this very key."""
    try:
        found = dict(json.loads(document)["key"])
    except (ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"the key of {name} is damaged", path=_KEY_PATH, check="key") from error
    differing = differences(key, found)
    if differing:
        raise IntegrityError(
            f"{name} is of another key than was asked for: {'; '.join(map(str, differing))}",
            hint="the daemon and this client may be of different versions",
            path=_KEY_PATH,
            check="key",
        )
