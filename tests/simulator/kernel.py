"""The simulated kernel below L2: what fsync promised, and what a power cut leaves of what it did not.

The files are real ones, on a tmpfs; only the calls that promise something are ours. Harsher than a journalling file
system: each page and each name that was not synced is there or not as the seed says.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import cached.levels.disk as disk_module
from tests.simulator.faults import Faults

_PAGE_BYTES = 512


class SimKernel:
    """Of one L2 folder. ``install`` before use; one at a time."""

    def __init__(self, l2: Path, faults: Faults, rng: random.Random) -> None:
        self._l2 = str(l2)
        self._faults = faults
        self._rng = rng
        self._content: dict[int, bytes] = {}
        self._names: dict[str, dict[str, int]] = {}
        self._lost: set[int] = set()

    def install(self) -> None:
        """Takes over fsync and fallocate of this process."""
        os.fsync = self._fsync  # type: ignore[assignment]
        disk_module._allocate = self._allocate  # the one place where L2 asks for blocks

    def has_durable(self, path: Path, content_is: Callable[[bytes], bool]) -> bool:
        """Whether a power cut cannot take this file."""
        inode = self._names.get(str(path.parent), {}).get(path.name)
        known = path.parent.name in self._names.get(str(path.parent.parent), {})
        return inode is not None and known and inode in self._content and content_is(self._content[inode])

    def cut_power(self) -> None:
        """Leaves what is durable, and of the rest what chance has written."""
        old = Path(self._l2 + ".before")
        if not os.path.isdir(self._l2):
            return
        os.rename(self._l2, old)
        self._rebuild(str(old), self._l2)
        shutil.rmtree(old)
        self._lost.clear()
        self._content.clear()
        self._names.clear()
        for folder, folders, files in os.walk(self._l2):
            self._names[folder] = {name: os.lstat(os.path.join(folder, name)).st_ino for name in (*folders, *files)}
            for name in files:
                path = os.path.join(folder, name)
                self._content[os.lstat(path).st_ino] = Path(path).read_bytes()

    def _rebuild(self, old: str, new: str) -> None:
        os.mkdir(new, 0o700)
        durable = self._names.get(new, {})
        current = {entry.name: entry for entry in sorted(os.scandir(old), key=lambda entry: entry.name)}
        for name in sorted(durable.keys() | current.keys()):
            entry = current.get(name)
            inode = entry.inode() if entry else None
            if durable.get(name) != inode:
                inode = self._rng.choice((durable.get(name), inode))
            if inode is None:
                continue
            if entry is not None and entry.is_dir(follow_symlinks=False):
                self._rebuild(entry.path, os.path.join(new, name))
                continue
            now = Path(entry.path).read_bytes() if entry and entry.inode() == inode else None
            synced = self._content.get(inode)
            if now is None and synced is None:
                continue
            Path(new, name).write_bytes(self._torn(synced, now))
            os.chmod(os.path.join(new, name), 0o600)

    def _torn(self, synced: bytes | None, now: bytes | None) -> bytes:
        if now is None or now == synced:
            return synced or b""
        before = (synced or b"").ljust(len(now), b"\0")
        pages = range(0, len(now), _PAGE_BYTES)
        return b"".join(self._rng.choice((before, now))[at : at + _PAGE_BYTES] for at in pages)[: len(now)]

    def _fsync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if not path.startswith(self._l2):
            return
        inode = os.fstat(fd).st_ino
        if self._faults.strikes("fsync_eio"):
            self._lost.add(inode)
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if self._faults.strikes("fsync_lies") or inode in self._lost:
            return
        if os.path.isdir(path):
            self._names[path] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._content[inode] = Path(f"/proc/self/fd/{fd}").read_bytes()  # which may be open for writing alone

    def _allocate(self, fd: int, size_bytes: int) -> None:
        if self._faults.strikes("disk_full"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._lost.discard(os.fstat(fd).st_ino)  # a new file
        self._content.pop(os.fstat(fd).st_ino, None)
        os.ftruncate(fd, size_bytes)
