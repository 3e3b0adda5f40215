"""A seed: a folder with a model's files and the record of what they were verified to be, ``.cached/manifest.json``.

`cached pull --standalone` writes seeds; the daemon takes content from those that ``l2.seed_dirs`` names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from cached.errors import CachedError, IntegrityError, InvalidRequestError
from cached.manifest import BlobRecord, FileEntry, Manifest, PlainReader

FORMAT = 1
FOLDER = ".cached"
"""Below the seed: what is ours there."""
RECORD = f"{FOLDER}/manifest.json"
_MAX_BYTES = 256 * 1024 * 1024
"""Far above what a model of 1 TB in 100,000 files needs."""


class Thoroughness(StrEnum):
    """How closely files that an earlier pull laid are looked at."""

    SIZE = "size"
    """Length and time of change; a file that differs is read."""
    CHUNKS = "chunks"
    """Every byte is read and compared with the CRC64 of its chunk."""
    FULL = "full"
    """That, and the SHA-256 of every file."""


@dataclass(frozen=True, slots=True)
class SeedRecord:
    """What the files of a seed are. ``blobs``: digest → checksums of its chunks; ``stamps``: path → mtime in ns."""

    manifest: Manifest
    blobs: Mapping[str, BlobRecord]
    stamps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entry in self.manifest.files:
            blob = self.blobs.get(entry.digest)
            if blob is None or blob.size_bytes != entry.size_bytes:
                raise InvalidRequestError(f"the record lacks the checksums of {entry.path}", value=entry.path)

    def entry(self, path: str) -> FileEntry | None:
        """What is recorded of a file."""
        return next((entry for entry in self.manifest.files if entry.path == path), None)

    def to_text(self) -> str:
        """As it is stored: JSON, a line for each file, for people who look into it."""
        lines = [
            json.dumps(item.to_dict(), sort_keys=True)
            for item in sorted(self.blobs.values(), key=lambda item: item.digest)
        ]
        data = {"format": FORMAT, "manifest": self.manifest.to_dict(), "stamps": dict(self.stamps)}
        head = json.dumps(data, indent=1, ensure_ascii=True)[:-2]
        return head + ',\n "blobs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"

    @staticmethod
    def from_text(text: str) -> SeedRecord:
        """Raises IntegrityError unless it is exactly what ``to_text`` gives."""
        try:
            data: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _damaged(f"it is not JSON: {error}") from error
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise _damaged(f"its format is {str(data.get('format'))[:20]!r}, not {FORMAT}")
        reader = PlainReader("record of a seed", data)
        reader.integer("format")
        blobs = [BlobRecord.from_dict(item) for item in reader.items("blobs")]
        stamps = PlainReader("table of stamps", reader.table("stamps"))
        manifest = Manifest.from_dict(reader.table("manifest"))
        found = {entry.path: stamps.integer(entry.path) for entry in manifest.files}
        stamps.finish()
        reader.finish()
        try:
            return SeedRecord(manifest, {blob.digest: blob for blob in blobs}, found)
        except CachedError as error:
            raise _damaged(error.message) from error


def read_seed(folder: Path) -> SeedRecord | None:
    """The record of a seed; None where there is none. Blocks. Raises IntegrityError for one that cannot be used."""
    path = folder / RECORD
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise _damaged(f"it cannot be read: {error.strerror}", path) from error
    try:
        if len(data) > _MAX_BYTES:
            raise _damaged("it is too large")
        return SeedRecord.from_text(data.decode("ascii"))
    except UnicodeDecodeError as error:
        raise _damaged("it is not ASCII", path) from error
    except IntegrityError as error:
        raise _damaged(error.message, path) from error


def _damaged(cause: str, path: Path | str = "") -> IntegrityError:
    return IntegrityError(
        f"the record {path or 'of a seed'} cannot be used: {cause}",
        hint="lay the seed again: cached pull REF --standalone --to DIR --force",
        path=path,
        check="seed-record",
    )
