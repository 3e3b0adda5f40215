"""The host's own trace of attaches, as `cached simulate` reads it: kept in two files that follow each other."""

from __future__ import annotations

import asyncio
import csv
import io
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path

import structlog

from cached.cache.background import repeat
from cached.cache.failures import Failures
from cached.clock import Clock
from cached.errors import LevelError
from cached.leases import Lease
from cached.own_files import opener
from cached.types import Attached
from cached.units import MIB

_log = structlog.get_logger(__name__)

COLUMNS = ("time_s", "model", "size_bytes", "lease_s")
_WRITE_S = 30.0
_ROTATE_BYTES = 4 * MIB
"""Two files of this size hold some hundred thousand attaches: months, on most hosts."""
_WAITING = 20_000
"""Rows that wait to be written, should the disk refuse them for long."""


class TraceFiles:
    """Rows in ``trace.csv``, after those of ``trace.1.csv``. From any thread; both are whole traces by themselves."""

    def __init__(self, folder: Path, *, rotate_bytes: int = _ROTATE_BYTES) -> None:
        self._current, self._before = folder / "trace.csv", folder / "trace.1.csv"
        self._rotate_bytes = rotate_bytes
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        """Where rows are appended."""
        return self._current

    def append(self, rows: Iterable[Attached]) -> None:
        """Raises OSError. What a crash left of a line stays apart from what is added."""
        with self._lock:
            size_bytes = self._size_bytes()
            if size_bytes >= self._rotate_bytes:
                self._current.replace(self._before)
                size_bytes = 0
            with open(self._current, "a+b", opener=opener) as file:
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                if not size_bytes:
                    writer.writerow(COLUMNS)
                else:
                    file.seek(-1, io.SEEK_END)
                    text.write("" if file.read(1) == b"\n" else "\n")
                writer.writerows((f"{row.time_s:.3f}", row.model, row.size_bytes, f"{row.lease_s:.3f}") for row in rows)
                file.write(text.getvalue().encode())

    def _size_bytes(self) -> int:
        return self._current.stat().st_size if self._current.exists() else 0

    def read(self) -> list[Attached]:
        """All rows that can be read; how many cannot is logged."""
        rows: list[Attached] = []
        with self._lock:
            for path in (self._before, self._current):
                try:
                    with open(path, "rb", opener=opener) as file:
                        lines = file.read().splitlines()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    _log.warning("trace.unreadable", path=str(path), cause=str(error))
                    continue
                found = [row for line in lines if (row := _row(line)) is not None]
                damaged = sum(1 for line in lines if line != _HEADER) - len(found)
                if damaged:
                    _log.warning("trace.damaged_lines", path=str(path), lines=damaged)
                rows += found
        return rows


_HEADER = ",".join(COLUMNS).encode()


def _row(line: bytes) -> Attached | None:
    """None for the header, and for a line that is not what was written."""
    try:
        ((time_s, model, size_bytes, lease_s),) = csv.reader([line.decode()], strict=True)
        row = Attached(float(time_s), model, int(size_bytes), float(lease_s))
    except (ValueError, csv.Error):
        return None
    sound = isfinite(row.time_s) and isfinite(row.lease_s) and row.lease_s >= 0
    return row if sound and row.size_bytes > 0 and model.strip() and model.isprintable() else None


class TraceLog:
    """Loop only, but for what ``rows`` gives out. Finished attaches wait in memory to be written now and then."""

    def __init__(self, files: TraceFiles, clock: Clock) -> None:
        self._files = files
        self._clock = clock
        self._held: dict[str, Lease] = {}
        self._finished: deque[Attached] = deque(maxlen=_WAITING)

    def opened(self, lease: Lease) -> None:
        """A worker attached."""
        if lease.size_bytes > 0:  # a model without a byte costs nobody anything
            self._held[lease.lease_id] = lease

    def closed(self, lease: Lease) -> None:
        """It let go; a lease that was taken up again after a restart is not an attach of its own."""
        if self._held.pop(lease.lease_id, None) is not None:
            self._finished.append(_attached(lease, self._clock.monotonic_s() - lease.since_s))

    def rows(self) -> Iterator[Attached]:
        """All attaches that are remembered, oldest first. May be taken in any thread; files are read with the first."""
        recent = [*self._finished, *(_attached(lease, 0.0) for lease in self._held.values())]
        return self._all(recent)

    def _all(self, recent: list[Attached]) -> Iterator[Attached]:
        yield from sorted([*self._files.read(), *recent], key=lambda row: row.time_s)

    async def run(self, failures: Failures) -> None:
        """Until cancelled."""
        await repeat(self._clock, _WRITE_S, self.write, what="trace", failures=failures)

    async def write(self) -> None:
        """Appends what has finished. A crash costs what was not written yet, and leases that are held.

        Raises LevelError where the disk does not take it; it is kept for the next time.
        """
        rows = list(self._finished)
        if not rows:
            return
        self._finished.clear()
        # A thread cannot be cancelled: its rows are written whatever becomes of us.
        thread = asyncio.ensure_future(asyncio.to_thread(self._files.append, rows))
        try:
            await asyncio.shield(thread)
        except OSError as error:
            self._finished.extendleft(reversed(rows))
            raise LevelError(
                f"the trace of {len(rows)} attaches could not be written: {error.strerror}",
                hint="make room in, or mend, the disk of daemon.state_dir",
                path=self._files.path, cause=error.strerror,
            ) from error  # fmt: skip


def _attached(lease: Lease, lease_s: float) -> Attached:
    return Attached(lease.since_time_s, lease.name, lease.size_bytes, max(0.0, lease_s))
