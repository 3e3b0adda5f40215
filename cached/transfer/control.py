"""What a job can be told while a mover works on it. Thread-safe; knows nothing of pipes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cached.errors import MoverError
from cached.origins.base import Abort


class Control:
    """The ends of one job's strings: ``abort`` and ``proceed`` for who asked, the rest for who works on it."""

    def __init__(self, report_arrival: Callable[[], None] = lambda: None) -> None:
        self.abort = Abort()
        self._report_arrival = report_arrival
        self._told = threading.Event()
        self._may_write = False

    def proceed(self) -> None:
        """Lets ``arrived`` return."""
        self._may_write = True
        self._told.set()

    def arrived(self) -> None:
        """Reports that the bytes are here and waits until they may be written. Raises MoverError when they may not."""
        with self.abort.calling(self._told.set):
            self._report_arrival()
            self._told.wait()
        if not self._may_write:
            self.check()

    def check(self) -> None:
        """Raises MoverError after an abort."""
        if self.abort.aborted:
            raise MoverError("it was ended early, as asked")
