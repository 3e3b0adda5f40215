"""Compile artifacts: found by their exact key, here or at the destination, saved, and uploaded behind that.

An artifact is a revision as any other, under a name that nothing else may have: its blobs are verified, kept, evicted
and leased as those of models are. What is particular about it is only how it comes: from a worker.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Callable, Mapping

from cached.artifact_types import Artifact, ArtifactFound, ArtifactOffer, PutOutcome
from cached.cache.artifact_key import (
    KEY_PATH,
    MAX_DOCUMENT_BYTES,
    Archive,
    Destination,
    current_archive,
    distance,
    key_document,
    name_of,
    parse_archive,
    parse_document,
    too_large,
)
from cached.cache.artifact_upload import ArtifactUploads
from cached.cache.artifact_writer import ArtifactWriter
from cached.cache.asking import asked
from cached.cache.background import repeat
from cached.cache.evictor import Evictor
from cached.cache.loader import Loader
from cached.cache.registry import Model
from cached.cache.resolver import Resolver
from cached.cache.services import Services
from cached.config import ArtifactsConfig
from cached.errors import (
    CachedError,
    IntegrityError,
    InvalidRequestError,
    MoverError,
    NotFoundError,
    OriginError,
    PermissionDeniedError,
)
from cached.level import Level
from cached.manifest import Manifest
from cached.origins.base import OriginObject
from cached.refs import artifact_digest, artifact_name, check_digest
from cached.transfer.jobs import ListObjects, ReadTexts, Texts
from cached.types import Peer
from cached.units import parse_size

_TICKET_S = 60.0
_TIDY_S = 5.0
_MAX_TICKETS = 1024
_MAX_ASKED = 1024
_NEAREST = 3
_MAX_REMOTE = 256
"""Keys that are read at the destination to compare with; a listing shows no more either."""


def destination_of(config: ArtifactsConfig) -> Destination:
    """As the settings say."""
    return Destination(config.destination, parse_size(config.max_size))


class Artifacts:
    """Loop only."""

    def __init__(
        self, services: Services, resolver: Resolver, loader: Loader, evictor: Evictor, config: ArtifactsConfig
    ) -> None:
        self._services = services
        self._resolver = resolver
        self._loader = loader
        self._evictor = evictor
        self._may_save = config.save
        self._destination = destination_of(config)
        self._keys: dict[str, dict[str, str]] = {}
        self._asked: dict[str, dict[str, str]] = {}
        """Keys by the names that they give, of what was asked for lately."""
        self._tickets: dict[str, tuple[float, Peer]] = {}
        self._saving: set[str] = set()
        self._writer = ArtifactWriter(services, loader, evictor)
        self.uploads = ArtifactUploads(services, evictor, resolver, self._destination)

    # Finding.

    async def find(
        self, key: Mapping[str, str], *, local_only: bool, sees: Callable[[str], bool] = lambda _name: True
    ) -> ArtifactFound:
        """The artifact of exactly this key, here or else at the destination; where there is none, those nearest to it.

        With ``local_only`` nobody else is asked. For who does not see an artifact (``sees``, by name) there is none.

        Raises InvalidRequestError for what is no key, and what keeps the destination from being asked.
        """
        name = name_of(key)
        self._note_key(name, key)
        found = self.here(name)
        if found is None and not local_only:
            found = await self._at_destination(name, key)
        found = found if sees(name) else None
        nearest: list[Artifact] = []
        if found is None:
            remote = [] if local_only else await self._remote()
            others = {item.name: item for item in (*remote, *self.local()) if item.name != name and sees(item.name)}
            nearest = sorted(others.values(), key=lambda item: (distance(key, item.key), -item.saved_time_s, item.name))
        return ArtifactFound(name, found, tuple(nearest[:_NEAREST]), self._destination.uri)

    async def known(self, *, remote: bool) -> tuple[Artifact, ...]:
        """Those of this host, latest first; with ``remote`` also those that are only at the destination."""
        found = self.local()
        if remote:
            known = {item.name for item in found}
            found += [item for item in await self._remote() if item.name not in known]
        return tuple(sorted(found, key=lambda item: (-item.saved_time_s, item.name)))

    def local(self) -> list[Artifact]:
        """All whose bytes are on this host."""
        names = [name for name in self._services.registry.models if artifact_digest(name)]
        return [item for name in names if (item := self.here(name)) is not None]

    def here(self, name: str) -> Artifact | None:
        """The artifact of this name, if its bytes are on this host and fit."""
        model = self._services.registry.models.get(name)
        manifest = model.current if model else None
        if model is None or manifest is None or not self._services.registry.is_here(manifest):
            return None
        if self._services.registry.is_quarantined(manifest):
            return None
        archive = _archive_of(manifest)
        key = self._key_of(manifest)
        return self._described(model, manifest, archive, key) if archive is not None and key is not None else None

    def model_of(self, name: str) -> str:
        """The model that an artifact was compiled for, as its key says; empty where no key of this name was seen."""
        key = self._keys.get(name) or self._asked.get(name)
        if key is None:
            model = self._services.registry.models.get(name)
            manifest = model.current if model else None
            key = self._key_of(manifest) if manifest and self._services.registry.is_here(manifest) else None
        return key["model"] if key else ""

    def _note_key(self, name: str, key: Mapping[str, str]) -> None:
        """Whoever attaches it next asks by name alone, and then it is told by its key who may."""
        self._asked[name] = dict(key)
        while len(self._asked) > _MAX_ASKED:
            del self._asked[next(iter(self._asked))]

    def _described(self, model: Model, manifest: Manifest, archive: Archive, key: Mapping[str, str]) -> Artifact:
        registry = self._services.registry
        levels = [level for level in (Level.L1, Level.L2) if registry.resident(manifest, level)]
        size_bytes = next(entry.size_bytes for entry in manifest.files if entry.path == archive.path)
        return Artifact(
            name=model.name,
            key=key,
            archive_path=archive.path,
            sha256=archive.sha256,
            size_bytes=size_bytes,
            generation=archive.generation,
            saved_time_s=manifest.created_time_s,
            last_used_time_s=model.record.last_used_wall_s,
            levels=tuple(levels),
            source=manifest.source,
            upload_error=self.uploads.errors.get(model.name, ""),
        )

    def _key_of(self, manifest: Manifest) -> dict[str, str] | None:
        """The key of an artifact of this host, as its document says; None where that cannot be read now."""
        if manifest.name not in self._keys:
            try:
                data = self._read_document(manifest)
                self._keys[manifest.name] = parse_document(data, manifest.name)
            except (CachedError, OSError, StopIteration) as error:
                self._services.events.emit(
                    "artifact.unreadable", f"the key of {manifest.name} cannot be read: {error}", name=manifest.name
                )
                return None
        return self._keys[manifest.name]

    def _read_document(self, manifest: Manifest) -> bytes:
        digest = next(entry.digest for entry in manifest.files if entry.path == KEY_PATH)
        blob = self._services.registry.blobs[digest]
        fd = self._services.storage.level(Level.L2 if blob.l2 else Level.L1).open_blob(digest)
        try:
            return os.read(fd, MAX_DOCUMENT_BYTES + 1)
        finally:
            os.close(fd)

    async def _at_destination(self, name: str, key: Mapping[str, str]) -> Artifact | None:
        source = self._destination.source_of(name)
        if not source:
            return None
        try:
            items = await self._resolver.listed(ListObjects(self._resolver.spec_of(source)))
        except NotFoundError:
            return None
        return self._described_remote(name, key, items)

    def _described_remote(self, name: str, key: Mapping[str, str], items: tuple[OriginObject, ...]) -> Artifact | None:
        by_path = {item.path: item for item in items}
        archive = current_archive(by_path)
        if archive is None or KEY_PATH not in by_path:
            return None
        return Artifact(
            name=name, key=key, archive_path=archive.path, sha256=archive.sha256,
            size_bytes=by_path[archive.path].size_bytes, generation=archive.generation,
            source=self._destination.source_of(name),
        )  # fmt: skip

    async def _remote(self) -> list[Artifact]:
        """Those of the destination, of which at most some are looked at; documents that are wrong are left out."""
        if not self._destination.uri:
            return []
        spec = self._resolver.spec_of(self._destination.uri)
        try:
            listing = await self._resolver.listed(ListObjects(spec))
        except NotFoundError:
            return []
        folders: dict[str, list[OriginObject]] = {}
        for item in listing:
            folder, _, path = item.path.rpartition("/")
            folders.setdefault(folder, []).append(OriginObject(path, item.size_bytes, item.version))
        names = [name for folder in sorted(folders) if (name := _name_of_folder(folder))][:_MAX_REMOTE]
        documents = [
            OriginObject(f"{artifact_digest(name)}/{KEY_PATH}", item.size_bytes, item.version)
            for name in names
            for item in folders[artifact_digest(name)]
            if item.path == KEY_PATH
        ]
        found = []
        for name, key in (await self._read_keys(ReadTexts(spec, tuple(documents), MAX_DOCUMENT_BYTES))).items():
            described = self._described_remote(name, key, tuple(folders[artifact_digest(name)]))
            if described is not None:
                found.append(described)
        return found

    async def _read_keys(self, job: ReadTexts) -> dict[str, dict[str, str]]:
        answer = await asked(self._services, job) if job.items else Texts(())
        if not isinstance(answer, Texts):
            raise MoverError("a mover answered the reading of small objects with something else")
        keys = {}
        for item, text in zip(job.items, answer.values, strict=True):
            name = artifact_name(item.path.partition("/")[0])
            try:
                keys[name] = parse_document(text.encode(), name)
                self._note_key(name, keys[name])
            except IntegrityError as error:
                self._services.events.emit("artifact.unreadable", error.message, name=name)
        return keys

    # Saving.

    def ticket(self, peer: Peer) -> str:
        """What lets this peer save one artifact within a minute. Raises PermissionDeniedError where saving is off."""
        if not self._may_save:
            raise PermissionDeniedError(
                "this daemon does not let workers save compile artifacts",
                hint="set artifacts.save, where all workers of the host trust each other: what is saved is code",
                uid=peer.uid, gid=peer.gid,
            )  # fmt: skip
        now_s = self._services.clock.monotonic_s()
        self._tickets = {ticket: seen for ticket, seen in self._tickets.items() if seen[0] > now_s}
        while len(self._tickets) >= _MAX_TICKETS:
            del self._tickets[next(iter(self._tickets))]
        ticket = secrets.token_urlsafe(32)
        self._tickets[ticket] = (now_s + _TICKET_S, peer)
        return ticket

    async def put(self, offer: ArtifactOffer, data: AsyncIterator[bytes]) -> tuple[PutOutcome, Artifact | None]:
        """Takes an archive in, unless the same or another one is current. Nothing is kept unless all of it is right.

        Raises PermissionDeniedError without a ticket, InvalidRequestError, NoRoomError, or IntegrityError where the
        bytes are not what was offered. Cancelled, it leaves nothing.
        """
        peer = self._admitted(offer)
        name = name_of(offer.key)
        if name in self._saving:
            return PutOutcome.BUSY, self.here(name)
        self._saving.add(name)
        try:
            current = self.here(name) or await self._known_elsewhere(name, offer.key)
            if current is not None and current.sha256 in {offer.sha256, offer.replaces_sha256}:
                if current.sha256 == offer.sha256:
                    return PutOutcome.SAME, current
            elif current is not None:
                return PutOutcome.OTHER, current
            generation = 1 + (current.generation if current else 0)
            await self._writer.write(name, key_document(offer.key), offer, generation, data)
        finally:
            self._saving.discard(name)
        stored = self.here(name)
        self._services.events.emit(
            "artifact.saved", f"uid {peer.uid} saved the compile artifact of {offer.key['model']}", name=name,
            uid=peer.uid, pid=peer.pid, sha256=offer.sha256, size_bytes=offer.size_bytes, generation=generation,
        )  # fmt: skip
        self.uploads.wake()
        return PutOutcome.STORED, stored

    async def _known_elsewhere(self, name: str, key: Mapping[str, str]) -> Artifact | None:
        """As the destination says; one that does not answer keeps nobody from saving: the upload is tried again."""
        try:
            return await self._at_destination(name, key)
        except OriginError as error:
            self._services.events.emit(
                "artifact.upload_failed", f"the destination does not answer: {error.message}", name=name,
                reason=error.reason,
            )  # fmt: skip
            return None

    def _admitted(self, offer: ArtifactOffer) -> Peer:
        until_s, peer = self._tickets.pop(offer.ticket, (float("-inf"), Peer(0, 0, 0)))
        if not self._may_save or until_s < self._services.clock.monotonic_s():
            raise PermissionDeniedError(
                "the ticket to save a compile artifact is not valid, or not any more",
                hint="get one at the descriptor socket for each artifact, and use it within a minute",
            )
        check_digest(offer.sha256)
        if offer.replaces_sha256:
            check_digest(offer.replaces_sha256)
        if offer.size_bytes < 1:
            raise InvalidRequestError("the archive is empty", value=offer.size_bytes)
        if offer.size_bytes > self._destination.max_bytes:
            raise too_large(offer.size_bytes, self._destination.max_bytes)
        return peer

    # What is over.

    async def run(self) -> None:
        """Uploads what was saved, and looks after what is in L1, until cancelled."""
        tidying = repeat(self._services.clock, _TIDY_S, self._tidy, what="artifacts", failures=self._services.failures)
        await asyncio.gather(self.uploads.run(), tidying)

    async def _tidy(self) -> None:
        """What came to L2 only after its last lease, or was left in L1 by an earlier daemon."""
        registry = self._services.registry
        for name in [name for name in registry.models if artifact_digest(name)]:
            for manifest in list(registry.models[name].manifests.values()):
                if registry.bytes_at(manifest, Level.L1):
                    self.released(manifest)

    def released(self, manifest: Manifest) -> None:
        """Its last lease ended: an archive is read once at a start, so it leaves L1 at once where L2 has it."""
        registry = self._services.registry
        if not registry.whole_at(manifest, Level.L2) or self._loader.is_loading(manifest.name, manifest.revision):
            return
        if not self._evictor.is_busy(manifest) and not self._evictor.is_leased(manifest.name, manifest.revision):
            self._evictor.evict([manifest], Level.L1, "artifact")


def _archive_of(manifest: Manifest) -> Archive | None:
    return next((found for entry in manifest.files if (found := parse_archive(entry.path)) is not None), None)


def _name_of_folder(folder: str) -> str:
    name = f"artifact.{folder}"
    return name if artifact_digest(name) else ""
