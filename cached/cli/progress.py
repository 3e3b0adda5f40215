"""Progress of long work, on standard error: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from cached.cli.output import clean, is_terminal, rate, say
from cached.units import format_size

_LINE_INTERVAL_S = 5.0


class Meter(Protocol):
    """Shows how far something is. Used from one thread, as a context manager."""

    def update(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """``what`` is a few words, with the phase; a total of 0 means that it is not known yet."""
        ...

    def line(self, text: str) -> None:
        """A line of its own, above the bar."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def meter(*, quiet: bool = False) -> Meter:
    """The meter that fits standard error; ``quiet``: none but on a terminal."""
    return Bar() if is_terminal() else Lines(quiet=quiet)


class Bar:
    """A bar with bytes, speed and the time that is left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None)

    def update(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, description=clean(what), completed=done_bytes, total=total_bytes or None)

    def line(self, text: str) -> None:
        """Above the bar."""
        self._progress.console.print(clean(text), markup=False, soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()


class Lines:
    """A line for each new phase and then every few seconds."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._what = ""
        self._next_s = 0.0
        self._began_s = 0.0
        self._began_bytes = 0

    def update(self, what: str, done_bytes: int, total_bytes: int) -> None:
        """Prints, if it is time."""
        now_s = time.monotonic()
        if what != self._what:
            self._what, self._began_s, self._began_bytes = what, now_s, done_bytes
        elif now_s < self._next_s:
            return
        self._next_s = now_s + _LINE_INTERVAL_S
        speed = rate(done_bytes - self._began_bytes, now_s - self._began_s)
        share = f" {100 * done_bytes // total_bytes}% of {format_size(total_bytes)}" if total_bytes else ""
        self.line(f"{what}{share}{', ' + speed if speed else ''}")

    def line(self, text: str) -> None:
        """Among the others."""
        if not self._quiet:
            say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to undo."""
