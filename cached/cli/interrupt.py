"""Ctrl-C that is always heard."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_REPEAT_S = 1.0


@contextmanager
def heard_interrupts() -> Iterator[None]:
    """Repeats KeyboardInterrupt once a second after a SIGINT, until it has left this context.

    An exception that is raised while gRPC calls back into Python cannot leave gRPC: the interpreter prints it, or not,
    and goes on. So a single one may be lost. Does nothing outside the main thread, or where SIGINT is ignored.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    before = signal.signal(signal.SIGALRM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, before)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, _REPEAT_S)
    raise KeyboardInterrupt
