"""A directory as one archive: a plain tar whose bytes depend on paths, contents and executable bits, and nothing else.

Not compressed: what a compressor makes of the same bytes changes with its version, and then the same content would be
another artifact.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tarfile
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cached_client.errors import ArtifactError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PIECE_BYTES = 512 * 1024
"""The most that the daemon takes at once."""
EXCLUDED = (".cached-restore.*", "*.lock", "*.tmp", ".tmp*", "tmp.*", "__pycache__")
"""What compilers leave beside what they made: locks, unfinished files, byte code (which depends on times)."""
_BLOCK_BYTES = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK_BYTES)

# What an archive may hold: a save keeps to it, for a restore refuses whatever does not.
MAX_FILES = 100_000
_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 255
_MAX_DEPTH = 32


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive; ``path`` is relative, with forward slashes."""

    path: str
    size_bytes: int
    executable: bool

    def header(self) -> bytes:
        """Its tar header, of one or several blocks."""
        info = tarfile.TarInfo(self.path)
        info.size = self.size_bytes
        info.mode = 0o755 if self.executable else 0o644
        return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def scan(directory: Path, exclude: Sequence[str] = EXCLUDED) -> tuple[tuple[Member, ...], tuple[str, ...]]:
    """The regular files below a directory by path, and what was left out though nobody excluded it.

    ``exclude``: patterns on the name of a file or folder. Links, sockets, devices and empty folders are left out; links
    are not followed. So are paths that `unpack` would refuse. Raises ArtifactError if the directory cannot be read, or
    holds too many files.
    """
    members: list[Member] = []
    left_out: list[str] = []
    try:
        _scan(os.fspath(directory), "", exclude, members, left_out)
    except OSError as error:
        raise ArtifactError(
            f"the directory {directory} cannot be read: {error.strerror}",
            hint="name the directory of a compile cache, and let this user read it",
            path=directory,
        ) from error
    return tuple(sorted(members, key=lambda member: member.path.encode())), tuple(sorted(left_out))


def _scan(folder: str, prefix: str, exclude: Sequence[str], members: list[Member], left_out: list[str]) -> None:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = f"{prefix}{entry.name}"
            if any(fnmatchcase(entry.name, pattern) for pattern in exclude):
                continue
            found = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(found.st_mode):
                _scan(entry.path, f"{path}/", exclude, members, left_out)
            elif stat.S_ISREG(found.st_mode) and _is_plain(path):
                members.append(Member(path, found.st_size, bool(found.st_mode & stat.S_IXUSR)))
            else:
                left_out.append(path)
            if len(members) > MAX_FILES:
                raise ArtifactError(
                    f"there are more than {MAX_FILES} files below {folder}",
                    hint="name the directory of one compile cache", path=folder,
                )  # fmt: skip


def _is_plain(path: str) -> bool:
    """Whether every host can have a file of this path, and a restore takes it."""
    return path.isprintable() and "\\" not in path and not is_too_long(path)


def is_too_long(path: str) -> bool:
    """Whether a relative path is longer than one in an archive may be, in bytes, in parts, or in one of them."""
    encoded = path.encode("utf-8", "surrogatepass")
    parts = encoded.split(b"/")
    return len(encoded) > _MAX_PATH_BYTES or len(parts) > _MAX_DEPTH or max(map(len, parts)) > _MAX_PART_BYTES


class Archive:
    """The archive of a directory as it is now. The files are read when ``pieces`` is iterated over, each time again."""

    def __init__(self, directory: Path, exclude: Sequence[str] = EXCLUDED) -> None:
        """Raises ArtifactError, also for a directory without any file to save."""
        self._directory = os.fspath(directory)
        self.members: tuple[Member, ...]
        self.left_out: tuple[str, ...]
        self.members, self.left_out = scan(directory, exclude)
        if not self.members:
            raise ArtifactError(
                f"there is nothing to save in {directory}", hint="let the engine compile first", path=directory
            )
        self.size_bytes: int = sum(len(member.header()) + _padded(member.size_bytes) for member in self.members)
        self.size_bytes += len(_END)

    def sha256(self) -> str:
        """Of all its bytes."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def pieces(self) -> Iterator[bytes]:
        """Its bytes in order, ``PIECE_BYTES`` at a time. Raises ArtifactError if a file has changed since."""
        waiting = bytearray()
        for part in self._parts():
            waiting += part
            while len(waiting) >= PIECE_BYTES:
                yield bytes(waiting[:PIECE_BYTES])
                del waiting[:PIECE_BYTES]
        yield bytes(waiting)

    def _parts(self) -> Iterator[bytes]:
        for member in self.members:
            yield member.header()
            yield from self._content(member)
            yield bytes(_padded(member.size_bytes) - member.size_bytes)
        yield _END

    def _content(self, member: Member) -> Iterator[bytes]:
        left_bytes = member.size_bytes
        try:
            fd = os.open(os.path.join(self._directory, member.path), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(fd, "rb", buffering=0) as file:
                while left_bytes and (part := file.read(min(left_bytes, PIECE_BYTES))):
                    left_bytes -= len(part)
                    yield part
                grown = bool(file.read(1))
        except OSError as error:
            raise _changed(member, error.strerror or str(error)) from error
        if left_bytes or grown:
            raise _changed(member, "its length is another one")


def _changed(member: Member, why: str) -> ArtifactError:
    return ArtifactError(
        f"{member.path} was changed while it was read: {why}",
        hint="save when the engine has compiled, and nothing writes to the directory any more",
        path=member.path,
    )


def _padded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
