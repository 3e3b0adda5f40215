"""Segments and files that are there for one measurement, and signals that end it in order."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import signal
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.files import stat_ref
from cached.levels.memory import allocate_pages, open_mapping
from cached.levels.shm import SHM_FOLDER, ShmLevel

_T = TypeVar("_T")
_FILE_PREFIX = ".cached-measure-"
_INSTANCE = "measure-{pid}"
_SEGMENT = re.compile(r"cached\.measure-(\d+)\.")
FOLDER_PREFIX = "cached-bench-"
"""Of folders in shared memory; what follows is the process, as in the names of files and segments."""
_FOLDER = re.compile(re.escape(FOLDER_PREFIX) + r"(\d+)-")
_FILE = re.compile(re.escape(_FILE_PREFIX) + r"(\d+)-")


@dataclass(frozen=True, slots=True)
class Span:
    """How long something took, on the clock and of processors, and for how many bytes."""

    size_bytes: int
    seconds: float
    cpu_s: float = 0.0

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second."""
        return self.size_bytes / 1e9 / self.seconds if self.seconds > 0 else 0.0

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor time for 10^9 bytes."""
        return self.cpu_s / (self.size_bytes / 1e9) if self.size_bytes else 0.0


@contextmanager
def scratch_segment(size_bytes: int, folder: str = SHM_FOLDER, *, sparse: bool = False) -> Iterator[FileRef]:
    """A segment of L1 without pages, named after this process. Raises OSError, LevelError, NoRoomError.

    ``sparse``: it may be larger than what there is room for; only what is written takes memory.
    """
    free_bytes = _free_bytes(folder)
    if not sparse and size_bytes > free_bytes // 2:
        msg = f"{folder} has only {free_bytes >> 20} MiB free, too little to measure in"
        raise OSError(msg)
    level, ingest_id = ShmLevel(_INSTANCE.format(pid=os.getpid()), folder=folder), secrets.token_hex(8)
    with _removed(Path(folder, f"cached.{level.instance}.ingest.{ingest_id}")):
        yield level.create(ingest_id, size_bytes)


@contextmanager
def scratch_file(folder: Path, size_bytes: int) -> Iterator[FileRef]:
    """An empty file of this size on a disk. Raises OSError, also where there is too little room for it."""
    free_bytes = _free_bytes(folder)
    if size_bytes > free_bytes // 4:
        msg = f"{folder} has only {free_bytes >> 20} MiB free, too little to measure in"
        raise OSError(msg)
    path = folder / f"{_FILE_PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    with _removed(path):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(fd, size_bytes)
        finally:
            os.close(fd)
        yield stat_ref(Level.L2, str(path))


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    """What the block makes there is gone after it, wherever in it a signal came."""
    try:
        yield
    finally:
        with undisturbed():
            path.unlink(missing_ok=True)


@contextmanager
def undisturbed() -> Iterator[None]:
    """A signal that a person sends in this block is heard at its end; other threads than the main one get none."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: dict[int, None] = {}
    numbers = (signal.SIGINT, signal.SIGALRM, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, _: held.setdefault(number)) for number in numbers}
    try:
        yield
    finally:
        _restore(before)
        for number in held:
            signal.raise_signal(number)


@contextmanager
def filled_segment(size_bytes: int, folder: str = SHM_FOLDER) -> Iterator[FileRef]:
    """A segment with pages, of bytes that no disk can compress."""
    block = os.urandom(1 << 20)
    with scratch_segment(size_bytes, folder) as ref:
        with open_mapping(ref, writable=True) as mapping:
            allocate_pages(mapping, 0, size_bytes, huge=True)
            for at in range(0, size_bytes, len(block)):
                piece = block[: min(len(block), size_bytes - at)]
                mapping.view[at : at + len(piece)] = piece
        yield ref


def left_behind(folder: Path, proc: Path = Path("/proc")) -> list[Path]:
    """Scratch segments, files and folders in a folder whose process is gone: it was killed while it measured."""
    found = []
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    for name in names:
        match = _SEGMENT.match(name) or _FILE.match(name) or _FOLDER.match(name)
        if match and not (proc / match[1]).exists():
            found.append(folder / name)
    return sorted(found)


@contextmanager
def ended_in_order() -> Iterator[None]:
    """SIGTERM and SIGHUP end the block as Ctrl-C does, so that what it made is removed. In the main thread only.

    Each Ctrl-C is heard once: one that is repeated, as the other commands have it, would hit what cleans up.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        _restore(before)


def run_cancellable(main: Coroutine[Any, Any, _T]) -> _T:
    """``asyncio.run`` that a signal cancels once, so that what it began is ended in order; then KeyboardInterrupt.

    A KeyboardInterrupt out of the blue would also hit what cleans up. In the main thread only.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}

    async def guarded() -> _T:
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - this is one
        for number in numbers:
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await main

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    finally:
        _restore(before)


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _free_bytes(folder: str | Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize
