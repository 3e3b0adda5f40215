"""What is known of an ingest's chunks across restarts: one append-only text file for each ingest.

Each line is a body, a space and the CRC32 of the body in hex, so that a torn or damaged line is known for one and is
ignored. The first body is a JSON header that names the source; the others are ``chunk <index> <crc64> <level>`` and
``landed <sha256>``. Nothing is fsynced: a chunk that the journal names is verified again by its CRC before it is used,
so that a line too many or too few costs a read or a fetch, never a wrong byte.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Self

from cached.checksum import crc32, crc64_hex, parse_crc64_hex
from cached.errors import CachedError
from cached.level import Level
from cached.levels.files import is_digest, level_errors, open_checked
from cached.manifest import BlobRecord
from cached.units import MIB, chunk_count

FORMAT = 1
_MAX_BYTES = 64 * MIB
"""Far above what the largest blob needs (a line a chunk and level, some 40 bytes)."""


@dataclass(slots=True)
class JournalChunk:
    """A chunk that was verified: its CRC64-NVME, and the levels whose ingest had it then."""

    crc64: int
    levels: set[Level] = field(default_factory=set)


@dataclass(slots=True)
class JournalState:
    """What a journal says. ``landed_digest`` is empty until the ingest became a blob."""

    source_key: str
    size_bytes: int
    chunks: dict[int, JournalChunk] = field(default_factory=dict)
    landed_digest: str = ""


class IngestJournal:
    """An open journal. Belongs to the loop; an append is one small buffered write. Close it, or ``delete`` it.

    ``chunks`` and ``landed_digest`` grow with what is appended.
    """

    def __init__(self, path: str, fd: int, state: JournalState) -> None:
        """Takes over ``fd``. Use ``open``."""
        self.path = path
        self._fd = fd
        self._state = state

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, source_key: str, size_bytes: int) -> Self:
        """Opens the journal of this very source and size to go on with it; any other, or none, is begun anew.

        ``source_key`` is opaque: it must differ where the content may (another object, another version of it). Raises
        LevelError or NoRoomError.
        """
        name = os.fspath(path)
        state = read_journal(name)
        goes_on = state is not None and (state.source_key, state.size_bytes) == (source_key, size_bytes)
        if state is None or not goes_on:
            state = JournalState(source_key, size_bytes)
        fd = open_checked(Level.L2, name, os.O_RDWR) if os.path.lexists(name) else _create(name)
        journal = cls(name, fd, state)
        try:
            if goes_on:
                journal._end_torn_line()
            else:
                journal._begin()
        except CachedError:
            journal.close()
            raise
        return journal

    @property
    def chunks(self) -> dict[int, JournalChunk]:
        """Chunk index → what is known of it. To be read only."""
        return self._state.chunks

    @property
    def landed_digest(self) -> str:
        """The blob that the ingest became, or empty."""
        return self._state.landed_digest

    def chunk(self, index: int, crc64: int, level: Level) -> None:
        """Notes that ``level`` has this chunk, verified. Raises LevelError or NoRoomError."""
        if _note_chunk(self._state, index, crc64, level):
            self._append(f"chunk {index} {crc64_hex(crc64)} {level.value}")

    def landed(self, digest: str) -> None:
        """Notes that the ingest became the blob ``digest``. Raises as ``chunk``."""
        self._state.landed_digest = digest
        self._append(f"landed {digest}")

    def close(self) -> None:
        """Idempotent; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def delete(self) -> None:
        """Closes and removes the file; idempotent."""
        self.close()
        if os.path.lexists(self.path):
            with level_errors(Level.L2, self.path, "remove"):
                os.unlink(self.path)

    def _begin(self) -> None:
        with level_errors(Level.L2, self.path, "begin"):
            os.ftruncate(self._fd, 0)
        header = {"format": FORMAT, "source_key": self._state.source_key, "size_bytes": self._state.size_bytes}
        self._append(json.dumps(header))

    def _end_torn_line(self) -> None:
        """What a crash left without its newline must not spoil the next line."""
        with level_errors(Level.L2, self.path, "read"):
            size_bytes = os.fstat(self._fd).st_size
            torn = size_bytes > 0 and os.pread(self._fd, 1, size_bytes - 1) != b"\n"
        if torn:
            self._write(b"\n")

    def _append(self, body: str) -> None:
        self._write(_line(body))

    def _write(self, data: bytes) -> None:
        with level_errors(Level.L2, self.path, "write", len(data)):
            os.lseek(self._fd, 0, os.SEEK_END)
            while data:
                data = data[os.write(self._fd, data) :]


def read_journal(path: str | os.PathLike[str]) -> JournalState | None:
    """What a journal says, as far as it is whole; None if there is none or it has no valid header of a known format.

    Raises LevelError if it cannot be read or is not a file of ours.
    """
    name = os.fspath(path)
    if not os.path.lexists(name):
        return None
    fd = open_checked(Level.L2, name)
    with level_errors(Level.L2, name, "read"), os.fdopen(fd, "rb") as file:
        data = file.read(_MAX_BYTES)
    bodies = [body for line in data.split(b"\n") if (body := _body(line)) is not None]
    state = _parse_header(bodies[0]) if bodies else None
    if state is not None:
        for body in bodies[1:]:
            _apply(state, body)
    return state


def landed_record(path: str | os.PathLike[str]) -> BlobRecord | None:
    """The blob that an ingest became, if its journal knows all of it. Raises LevelError."""
    state = read_journal(path)
    if state is None or not state.landed_digest or len(state.chunks) != chunk_count(state.size_bytes):
        return None
    crc64 = tuple(state.chunks[index].crc64 for index in range(len(state.chunks)))
    return BlobRecord(state.landed_digest, state.size_bytes, crc64)


def _line(body: str) -> bytes:
    data = body.encode("ascii")  # json escapes all else
    return data + f" {crc32(data):08x}\n".encode("ascii")


def _body(line: bytes) -> str | None:
    """The body of a whole line, None for anything else."""
    data, _, crc_hex = line.rpartition(b" ")
    if not data or crc_hex != f"{crc32(data):08x}".encode("ascii"):
        return None
    return data.decode("ascii", "replace")


def _parse_header(body: str) -> JournalState | None:
    try:
        header = json.loads(body)
    except ValueError:
        return None
    match header:
        case {"format": int(found), "source_key": str(source_key), "size_bytes": int(size_bytes)} if found == FORMAT:
            return JournalState(source_key, size_bytes)
    return None


def _apply(state: JournalState, body: str) -> None:
    match body.split(" "):
        case ["chunk", index, crc_hex, ("l1" | "l2") as level] if index.isdecimal() and len(index) < 12:
            try:
                crc64 = parse_crc64_hex(crc_hex)
            except ValueError:
                return
            if int(index) < chunk_count(state.size_bytes):
                _note_chunk(state, int(index), crc64, Level(level))
        case ["landed", digest] if is_digest(digest):
            state.landed_digest = digest


def _note_chunk(state: JournalState, index: int, crc64: int, level: Level) -> bool:
    """False if that was known. Another CRC than the one known means other bytes: only where they are counts then."""
    known = state.chunks.get(index)
    if known is None or known.crc64 != crc64:
        state.chunks[index] = JournalChunk(crc64, {level})
        return True
    if level in known.levels:
        return False
    known.levels.add(level)
    return True


def _create(path: str) -> int:
    with level_errors(Level.L2, path, "create"):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
