"""Keys of compile artifacts: their documents, the names they give, and how artifacts lie at an origin. Pure.

At the destination an artifact is two objects below ``<SHA-256 of the key's document>/``: ``key.json``, that document,
and ``<generation>-<SHA-256 of the archive>.tar``. Both are named by what they hold, so that no upload can mix one
artifact with another, and a reader knows what to expect before the first byte.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cached.errors import IntegrityError, InvalidRequestError, NotFoundError
from cached.origins.base import OriginObject
from cached.refs import artifact_digest, artifact_name
from cached.units import format_size

KEY_PATH = "key.json"
MAX_DOCUMENT_BYTES = 64 * 1024
REQUIRED = ("model", "engine")
_FORMAT = 1
_MAX_FIELDS = 64
_MAX_VALUE = 512
_FIELD = re.compile(r"[a-z][a-z0-9_.-]{0,63}")
_ARCHIVE = re.compile(r"(\d{8})-([0-9a-f]{64})\.tar")


@dataclass(frozen=True, slots=True)
class Destination:
    """Where artifacts are uploaded to and looked for; ``uri`` is empty for nowhere."""

    uri: str
    max_bytes: int

    def source_of(self, name: str) -> str:
        """The URI below which an artifact lies; empty without a destination, and for whatever is no artifact."""
        digest = artifact_digest(name)
        return f"{self.uri.rstrip('/')}/{digest}" if self.uri and digest else ""


@dataclass(frozen=True, slots=True)
class Archive:
    """What the name of an archive says."""

    path: str
    generation: int
    sha256: str


def key_document(key: Mapping[str, str]) -> bytes:
    """The one document of a key: equal for equal keys, and readable. Raises InvalidRequestError."""
    problem = _problem(key)
    if problem:
        raise InvalidRequestError(
            f"the key of a compile artifact cannot be used: {problem}",
            hint="cached_client.artifacts.environment_key makes one; `cached artifact key` shows it",
            value=problem,
        )
    document = {"format": _FORMAT, "key": dict(key)}
    data = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True).encode("ascii") + b"\n"
    if len(data) > MAX_DOCUMENT_BYTES:
        raise InvalidRequestError(f"the key of a compile artifact has more than {MAX_DOCUMENT_BYTES} bytes", value="")
    return data


def _problem(key: Mapping[str, str]) -> str:
    missing = [name for name in REQUIRED if not key.get(name)]
    if missing:
        return f"{missing[0]!r} is missing"
    if len(key) > _MAX_FIELDS:
        return f"it has {len(key)} fields; at most {_MAX_FIELDS} are accepted"
    for name, value in key.items():
        if not _FIELD.fullmatch(name):
            return f"{name[:80]!r} is no name of a field (lower-case letters, digits, '_', '.', '-')"
        if not 0 < len(value) <= _MAX_VALUE or not value.isprintable():
            return f"{name} is {value[:40]!r}; write 1 to {_MAX_VALUE} printable characters"
    return ""


def name_of(key: Mapping[str, str]) -> str:
    """What the artifact of a key is called. Raises InvalidRequestError."""
    return artifact_name(hashlib.sha256(key_document(key)).hexdigest())


def parse_document(data: bytes, name: str) -> dict[str, str]:
    """The key, from the document of the artifact called ``name``. Raises IntegrityError for any other document."""
    try:
        document = json.loads(data)
        key = {str(field): str(value) for field, value in document["key"].items()}
        same = key_document(key) == data and name_of(key) == name
    except (ValueError, TypeError, KeyError, AttributeError, InvalidRequestError, RecursionError):
        same, key = False, {}
    if not same:
        raise IntegrityError(
            f"{KEY_PATH} of {name} is not the document that gave it its name", name=name, path=KEY_PATH, check="key",
            expected=artifact_digest(name), found=hashlib.sha256(data).hexdigest(),
        )  # fmt: skip
    return key


def archive_path(generation: int, sha256: str) -> str:
    """What an archive is called within its artifact."""
    return f"{generation:08d}-{sha256}.tar"


def parse_archive(path: str) -> Archive | None:
    """What the name of an archive says; None for another file."""
    match = _ARCHIVE.fullmatch(path)
    return Archive(path, int(match[1]), match[2]) if match else None


def current_archive(paths: Iterable[str]) -> Archive | None:
    """Of several the one of the highest generation, of those the first: on every host the same one."""
    archives = [found for path in paths if (found := parse_archive(path)) is not None]
    return min(archives, key=lambda found: (-found.generation, found.sha256), default=None)


def choose(name: str, items: Iterable[OriginObject], max_bytes: int) -> tuple[OriginObject, OriginObject]:
    """Key and archive of the artifact ``name`` among the objects of its source.

    Raises NotFoundError where it is not, or not yet, whole; InvalidRequestError where it is larger than is accepted.
    """
    by_path = {item.path: item for item in items}
    archive = current_archive(by_path)
    if archive is None or KEY_PATH not in by_path:
        raise NotFoundError(f"there is no compile artifact {name} at its source", ref=name, path="")
    size_bytes = by_path[archive.path].size_bytes
    if size_bytes > max_bytes or by_path[KEY_PATH].size_bytes > MAX_DOCUMENT_BYTES:
        raise too_large(size_bytes, max_bytes)
    return by_path[KEY_PATH], by_path[archive.path]


def too_large(size_bytes: int, max_bytes: int) -> InvalidRequestError:
    """The error for an archive beyond ``artifacts.max_size``."""
    return InvalidRequestError(
        f"the compile artifact has {format_size(size_bytes)}; at most {format_size(max_bytes)} are accepted",
        hint="raise artifacts.max_size of the daemon, or save a smaller directory",
        value=size_bytes,
        size_bytes=size_bytes,
        max_bytes=max_bytes,
    )


def distance(one: Mapping[str, str], other: Mapping[str, str]) -> int:
    """How many fields differ."""
    return sum(one.get(field) != other.get(field) for field in one.keys() | other.keys())
