"""Single keys of a terminal, read without waiting for a line."""

from __future__ import annotations

import os
import re
import select
import sys
import termios
import time
import tty
from collections import deque
from types import TracebackType
from typing import Any, Self

_SEQUENCES = re.compile(rb"\x1b(\[[0-9;]*[A-Za-z~]|O.|.)?")
"""What arrows, function keys and Alt send."""


class Keys:
    """A context manager: inside, keys arrive at once and are not shown. Without a terminal there are none."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[Any] = []
        self._typed: deque[str] = deque()

    def __enter__(self) -> Self:
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)

    def wait(self, timeout_s: float) -> str:
        """The next key, in lower case; empty when none came in time. Arrows and the like are no keys."""
        if self._typed:  # faster than they were asked for
            return self._typed.popleft()
        if self._fd < 0:
            time.sleep(timeout_s)
            return ""
        readable, _, _ = select.select([self._fd], [], [], timeout_s)
        if not readable:
            return ""
        data = os.read(self._fd, 64)
        if not data:  # the terminal is gone
            return "q"
        self._typed.extend(_SEQUENCES.sub(b"", data).decode("ascii", "ignore").lower())
        return self._typed.popleft() if self._typed else ""
