"""What has arrived of an attached model: the one place where the lease's thread and the readers meet."""

from __future__ import annotations

import threading
import time
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from cached_client._ranges import RangeSet
from cached_client.connection import limited
from cached_client.errors import CacheError, IntegrityError, SuspendedError, TimeoutExpiredError
from cached_client.types import DamagedRange, FileInfo, LoadReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cached_client.segment import MappedFile

T = TypeVar("T")


@dataclass(slots=True)
class _File:
    info: FileInfo
    mapped: MappedFile
    announced: RangeSet = field(default_factory=RangeSet)


class Deadline:
    """A time limit that several waits share."""

    def __init__(self, timeout_s: float | None) -> None:
        self.timeout_s: float | None = limited(timeout_s)
        self._end_s = None if self.timeout_s is None else time.monotonic() + self.timeout_s

    def left_s(self) -> float | None:
        """Seconds that remain, at least 0; None without a limit."""
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())


class Arrivals:
    """Files, announced ranges, completion, damage and failure of one attach.

    Written by the lease's thread, read by any. A lock guards every field; nothing slow happens under it, and no
    caller's code runs under it. Bytes are handed out only through `view`, which knows whether they may be read.
    """

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._changed = threading.Condition()
        self._version = 0
        self._revocations = 0
        self._files: list[_File] | None = None
        self._report: LoadReport | None = None
        self._error: CacheError | None = None
        self._damaged: list[DamagedRange] = []
        self._timings: dict[str, float] = {}

    # Written by the lease's thread.

    def opened(self, infos: Sequence[FileInfo], mapped: Sequence[MappedFile]) -> None:
        """A lease was opened, and its files are mapped.

        What an earlier lease announced is forgotten, damage too: its daemon is gone, and this one announces what it
        vouches for.
        """
        with self._changed:
            self._damaged.clear()
            self._revocations += 1
            self._files = [_File(info, file) for info, file in zip(infos, mapped, strict=True)]
            self._mark("opened")

    def announced(self, ranges: Sequence[tuple[int, int, int]]) -> None:
        """``(file index, offset, length)`` of bytes that may be read from now on."""
        with self._changed:
            for index, offset_bytes, length_bytes in ranges:
                self._file(index).announced.add(offset_bytes, offset_bytes + length_bytes)
            self._mark("first_range")
            self._timings["last_range"] = time.monotonic() - self._started_s

    def completed(self, report: LoadReport, only: Sequence[tuple[int, int, int]] | None = None) -> None:
        """Everything is there, and the strongest check has passed. ``only``: of a selection, what there is."""
        with self._changed:
            for file in (self._files or ()) if only is None else ():
                file.announced.add(0, file.info.size_bytes)
            for index, offset_bytes, length_bytes in only or ():
                self._file(index).announced.add(offset_bytes, offset_bytes + length_bytes)
            self._report = report
            self._mark("complete")

    def damaged(self, index: int, offset_bytes: int, length_bytes: int) -> DamagedRange:
        """These bytes may not be handed out any more."""
        with self._changed:
            damage = DamagedRange(self._file(index).info.path, offset_bytes, length_bytes)
            self._damaged.append(damage)
            self._revocations += 1
            self._mark("damaged")
            return damage

    def failed(self, error: CacheError) -> None:
        """The end: everyone who waits or asks from now on gets this error. The first one counts."""
        with self._changed:
            # Without its traceback, whose frames would keep the mappings alive (see Lease).
            self._error = self._error or error.with_traceback(None)
            self._revocations += 1
            self._mark("failed")

    def adopt(self, mapped: Sequence[MappedFile]) -> None:
        """Takes other mappings of the same files, by index, for those it has: a complete model's alone."""
        with self._changed:
            for file, other in zip(self._files or (), mapped, strict=True):
                file.mapped = other

    def end(self) -> None:
        """`failed`, since the model is closed. One that was suspended is so no longer."""
        with self._changed:
            if isinstance(self._error, SuspendedError):
                self._error = None
            self.failed(CacheError("the model was closed", hint="use it within its `with` block", reason="CLOSED"))

    def close(self) -> None:
        """`end`, and gives up the mappings."""
        self.end()
        with self._changed:
            for file in self._files or ():
                file.mapped.close()

    # Read by any thread.

    def wait_for(self, attempt: Callable[[], T | None], deadline: Deadline, what: str) -> T:
        """What ``attempt`` answers; it is called now, and after each arrival until its answer is not None.

        Raises the attach's own error once it failed, and TimeoutExpiredError, saying that ``what`` was waited for.
        """
        version = self.check()
        while (answer := attempt()) is None:
            version = self._wait_beyond(version, deadline, what)
        return answer

    def check(self) -> int:
        """The count of arrivals. Raises the error of an attach that failed."""
        with self._changed:
            self._raise_error()
            return self._version

    def mark(self, phase: str) -> None:
        """Notes in the timings that a moment has come, unless it came before."""
        with self._changed:
            self._mark(phase)

    def wake(self) -> None:
        """Has everyone who waits try again, for a reason that is not an arrival: somebody stops, or made room."""
        with self._changed:
            self._version += 1
            self._changed.notify_all()

    def is_open(self) -> bool | None:
        """True once the files are known, None before (for `wait_for`)."""
        return True if self._files is not None else None

    @property
    def is_failed(self) -> bool:
        """Whether `failed` was called: whoever reads gets that error."""
        return self._error is not None

    @property
    def revocations(self) -> int:
        """How often bytes that could be read may have ceased to be: by damage, a failure, a lease that began anew.

        While it is the same, what `view` handed out may still be handed on. Read without the lock, as it is asked for
        each of thousands of tensors.
        """
        return self._revocations

    @property
    def report(self) -> LoadReport | None:
        """Set when the model is complete."""
        return self._report

    @property
    def damage(self) -> tuple[DamagedRange, ...]:
        with self._changed:
            return tuple(self._damaged)

    @property
    def timings(self) -> dict[str, float]:
        """Seconds from the start of the attach to the first arrival of each kind, and to the last of ranges."""
        with self._changed:
            return dict(self._timings)

    @property
    def started_s(self) -> float:
        """When the attach began, of time.monotonic()."""
        return self._started_s

    def infos(self) -> list[FileInfo]:
        """The files, by index; empty before the attach is open."""
        with self._changed:
            return [file.info for file in self._files or ()]

    def mapped(self) -> list[MappedFile]:
        """The mappings, by index; empty before the attach is open."""
        with self._changed:
            return [file.mapped for file in self._files or ()]

    def spans(self, index: int) -> tuple[tuple[int, int], ...]:
        """The ranges of a file that may be read now, in order."""
        with self._changed:
            return self._file(index).announced.spans()

    def view(self, index: int, begin: int, end: int) -> memoryview | None:
        """Bytes ``[begin, end)`` of a file, or None while some of them may not be read yet.

        The view is writable, and a write stays private to this process. Raises IntegrityError for damaged bytes.
        """
        with self._changed:
            self._raise_error()
            file = self._file(index)
            for damage in self._damaged:
                ends_at = damage.offset_bytes + damage.length_bytes
                if damage.path == file.info.path and begin < ends_at and damage.offset_bytes < end:
                    raise _damage_error(damage)
            return file.mapped.view[begin:end] if file.announced.covers(begin, end) else None

    def _wait_beyond(self, version: int, deadline: Deadline, what: str) -> int:
        with self._changed:
            arrived = self._changed.wait_for(lambda: self._version > version or self._error, deadline.left_s())
            self._raise_error()
            if not arrived:
                raise TimeoutExpiredError(
                    f"{what} did not arrive within {deadline.timeout_s:g} s",
                    hint="it goes on in the daemon: `cached ls` shows how far it is",
                    what=what,
                    timeout_s=deadline.timeout_s,
                )
            return self._version

    def _mark(self, phase: str) -> None:
        self._timings.setdefault(phase, time.monotonic() - self._started_s)
        self._version += 1
        self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise copy(self._error) from self._error  # a copy: each thread adds its own traceback

    def _file(self, index: int) -> _File:
        if self._files is None or not 0 <= index < len(self._files):
            raise CacheError(f"the daemon spoke of file {index}, which this model does not have")
        return self._files[index]


def _damage_error(damage: DamagedRange) -> IntegrityError:
    return IntegrityError(
        f"{damage.path} is damaged in memory",
        hint="attach again: a new attach gets a clean copy",
        path=damage.path,
        offset_bytes=damage.offset_bytes,
        length_bytes=damage.length_bytes,
    )
