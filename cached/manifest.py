"""What a revision consists of, and the checksums its bytes are proven by. Values only; validated when they are made.

A revision's manifest names files and the blobs that hold their content; a blob's record holds its chunk checksums,
once, however many revisions share it.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cached.errors import CachedError, IntegrityError, InvalidRequestError
from cached.refs import check_digest, check_path, parse_ref
from cached.types import CheckedBy
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

MAX_FILES = 100_000
"""More files than any model has: a bound on what one listing can make us hold."""

_STRENGTH = tuple(CheckedBy)  # strongest first
_CRC_LIMIT = 1 << 64
_SIZE_LIMIT = 1 << 63


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """A blob: its SHA-256, length, and the CRC64-NVME of each of its 16 MiB chunks in order.

    Raises InvalidRequestError when the parts do not fit each other.
    """

    digest: str
    size_bytes: int
    crc64: tuple[int, ...]

    def __post_init__(self) -> None:
        check_digest(self.digest)
        _check_size(self.size_bytes)
        if len(self.crc64) != chunk_count(self.size_bytes):
            raise InvalidRequestError(
                f"a blob of {self.size_bytes} bytes has {chunk_count(self.size_bytes)} chunks, not {len(self.crc64)}",
                value=self.digest,
            )
        if any(not 0 <= crc < _CRC_LIMIT for crc in self.crc64):
            raise InvalidRequestError("a CRC64 has 64 bits", value=self.digest)

    def chunk(self, index: int) -> tuple[int, int, int]:
        """Offset in bytes, length in bytes and CRC64 of chunk ``index``."""
        return index * CHUNK_BYTES, chunk_length(self.size_bytes, index), self.crc64[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; the checksums are one hex string, 16 digits a chunk."""
        packed = struct.pack(f">{len(self.crc64)}Q", *self.crc64)
        return {"digest": self.digest, "size_bytes": self.size_bytes, "crc64": packed.hex()}

    @staticmethod
    def from_dict(data: object) -> BlobRecord:
        """Raises IntegrityError unless ``data`` is exactly what ``to_dict`` gives."""
        reader = PlainReader("blob record", data)
        digest, size_bytes = reader.text("digest"), reader.integer("size_bytes")
        packed = reader.text("crc64")
        reader.finish()
        try:
            raw = bytes.fromhex(packed)
            return BlobRecord(digest, size_bytes, struct.unpack(f">{len(raw) // 8}Q", raw))
        except (ValueError, struct.error, CachedError) as error:
            raise reader.wrong(f"{error}") from error


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a revision: its content is the blob ``digest``. Raises InvalidRequestError for an unsafe path."""

    path: str
    size_bytes: int
    digest: str
    checked_by: CheckedBy
    version: str = ""
    """The origin's marker of the object when it was pulled, for fetching a damaged chunk again; not a digest."""

    def __post_init__(self) -> None:
        check_path(self.path)
        check_digest(self.digest)
        _check_size(self.size_bytes)


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable revision. ``files`` keeps the order in which they are worth having.

    Raises InvalidRequestError when paths repeat, a file's path is another's folder, or sizes of one blob differ.
    """

    name: str
    revision: str
    source: str
    files: tuple[FileEntry, ...]
    created_time_s: float
    origin_options: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ref = parse_ref(f"{self.name}@{self.revision}")
        if (ref.name, ref.revision) != (self.name, self.revision):
            raise InvalidRequestError(f"{ref} is not a revision of a model", value=str(ref))
        if not 1 <= len(self.files) <= MAX_FILES:
            raise InvalidRequestError(
                f"a model has 1 to {MAX_FILES} files, not {len(self.files)}",
                hint="check the source's address and the include and exclude patterns",
                value=self.source,
            )
        check_paths(entry.path for entry in self.files)
        sizes: dict[str, int] = {}
        for entry in self.files:
            if sizes.setdefault(entry.digest, entry.size_bytes) != entry.size_bytes:
                raise InvalidRequestError(f"two sizes for the content of {entry.path!r}", value=entry.digest)

    @property
    def total_bytes(self) -> int:
        """Sum over the files, as they look in the model's folder."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def blobs(self) -> dict[str, int]:
        """Digest → bytes of each distinct blob, in the files' order: what the revision takes up at a level."""
        return {entry.digest: entry.size_bytes for entry in self.files}

    @property
    def checked_by(self) -> CheckedBy:
        """The weakest of the files' checks."""
        return max((entry.checked_by for entry in self.files), key=_STRENGTH.index)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "name": self.name,
            "revision": self.revision,
            "source": self.source,
            "origin_options": dict(self.origin_options),
            "created_time_s": self.created_time_s,
            "notes": list(self.notes),
            "files": [
                {
                    "path": entry.path,
                    "size_bytes": entry.size_bytes,
                    "digest": entry.digest,
                    "checked_by": entry.checked_by.value,
                    "version": entry.version,
                }
                for entry in self.files
            ],
        }

    @staticmethod
    def from_dict(data: object) -> Manifest:
        """Raises IntegrityError unless ``data`` is exactly what ``to_dict`` gives."""
        reader = PlainReader("manifest", data)
        files = [PlainReader("file of a manifest", item) for item in reader.items("files")]
        try:
            manifest = Manifest(
                name=reader.text("name"),
                revision=reader.text("revision"),
                source=reader.text("source"),
                origin_options=reader.texts_by_name("origin_options"),
                created_time_s=reader.number("created_time_s"),
                notes=reader.texts("notes"),
                files=tuple(_file_entry(item) for item in files),
            )
        except InvalidRequestError as error:
            raise reader.wrong(error.message) from error
        reader.finish()
        return manifest


def _file_entry(reader: PlainReader) -> FileEntry:
    checked_by = reader.text("checked_by")
    if checked_by not in {check.value for check in CheckedBy}:
        raise reader.wrong(f"{checked_by[:80]!r} is no kind of check")
    entry = FileEntry(
        path=reader.text("path"),
        size_bytes=reader.integer("size_bytes"),
        digest=reader.text("digest"),
        checked_by=CheckedBy(checked_by),
        version=reader.text("version"),
    )
    reader.finish()
    return entry


def revision_of(files: Iterable[tuple[str, int, str]]) -> str:
    """The revision that content of these (path, size in bytes, identity) makes, in any order: 16 hex digits.

    An identity is ``sha256:<hex>`` where the digest is known before the pull, else ``version:<the origin's marker>``.
    """
    rows = sorted(files)
    for path, _, identity in rows:
        if not identity.startswith(("sha256:", "version:")):
            raise InvalidRequestError(f"{identity[:80]!r} does not identify {path!r}", value=identity[:80])
    canonical = json.dumps(rows, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:16]


def check_paths(paths: Iterable[str]) -> None:
    """Raises InvalidRequestError unless the paths can exist in one folder: safe, distinct, no file also a folder."""
    seen: set[str] = set()
    for path in paths:
        if check_path(path) in seen:
            raise InvalidRequestError(f"the path {path!r} appears twice", value=path)
        seen.add(path)
    for path in seen:
        folder = path
        while "/" in folder:
            folder = folder.rpartition("/")[0]
            if folder in seen:
                raise InvalidRequestError(
                    f"{folder!r} is both a file and the folder of {path!r}",
                    hint="leave one of them out with an exclude pattern",
                    value=path,
                )


def _check_size(size_bytes: int) -> None:
    if not 0 <= size_bytes < _SIZE_LIMIT:
        raise InvalidRequestError(f"no file has a size of {size_bytes} bytes", value=size_bytes)


class PlainReader:
    """Takes a dictionary of plain data apart, strictly: each key once, each of its type, none left over.

    Everything wrong is an IntegrityError that names ``what`` was being read: such data is only ever our own.
    """

    def __init__(self, what: str, data: object) -> None:
        self._what = what
        if not isinstance(data, dict):
            raise self.wrong(f"it is a {type(data).__name__}, not a dictionary")
        self._left: dict[Any, Any] = dict(data)

    def wrong(self, cause: str) -> IntegrityError:
        """The error to raise."""
        return IntegrityError(
            f"a stored {self._what} is damaged: {cause}",
            hint="it is forgotten; pull the model again",
            check=self._what,
        )

    def text(self, key: str) -> str:
        """A string."""
        value = self._take(key)
        if not isinstance(value, str):
            raise self._mistyped(key, value)
        return value

    def integer(self, key: str) -> int:
        """A whole number; True and 1.0 are none."""
        value = self._take(key)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._mistyped(key, value)
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        value = self._take(key)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < _SIZE_LIMIT:
            return float(value)
        if not isinstance(value, float) or not math.isfinite(value):
            raise self._mistyped(key, value)
        return value

    def boolean(self, key: str) -> bool:
        """True or False."""
        value = self._take(key)
        if not isinstance(value, bool):
            raise self._mistyped(key, value)
        return value

    def items(self, key: str) -> list[object]:
        """A list of anything."""
        value = self._take(key)
        if not isinstance(value, list):
            raise self._mistyped(key, value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        items = self.items(key)
        if not all(isinstance(item, str) for item in items):
            raise self._mistyped(key, items)
        return tuple(str(item) for item in items)

    def texts_by_name(self, key: str) -> dict[str, str]:
        """A dictionary of strings."""
        value = self._take(key)
        if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
            raise self._mistyped(key, value)
        return dict(value)

    def table(self, key: str) -> dict[Any, Any]:
        """A dictionary of anything."""
        value = self._take(key)
        if not isinstance(value, dict):
            raise self._mistyped(key, value)
        return value

    def finish(self) -> None:
        """Raises unless every key was read."""
        if self._left:
            raise self.wrong(f"unknown keys {sorted(map(str, self._left))[:5]}")

    def _take(self, key: str) -> object:
        if key not in self._left:
            raise self.wrong(f"{key!r} is missing")
        return self._left.pop(key)

    def _mistyped(self, key: str, value: object) -> IntegrityError:
        return self.wrong(f"{key!r} is {str(value)[:40]!r}, a {type(value).__name__}")
