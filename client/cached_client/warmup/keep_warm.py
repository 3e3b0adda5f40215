"""Synthetic requests while nobody asks: what is not used for long is not fast when it is used again."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from cached_client.warmup.readiness import Readiness

_log = logging.getLogger("cached_client")

_MAX_IDLE_S = 365 * 86400.0
"""Python's conditions wait for no infinity: the thread would end with the first wait."""


class KeepWarm:
    """Calls ``call()`` whenever nothing was asked for ``idle_s``, in a thread of its own; never beside a real request.

    Wrap each real request in `busy`. Whoever comes while a synthetic request runs does not wait for it here: the two
    meet in the model, so the synthetic one should be small.

    With a ``readiness`` it calls only while that is ready, and after ``failures`` synthetic requests in a row that
    raised it tells that the worker is lost: a worker that cannot answer itself cannot answer users.

    Stop it by `close`, or use it as a context manager.
    """

    def __init__(
        self, call: Callable[[], object], *, idle_s: float = 60.0, readiness: Readiness | None = None, failures: int = 3
    ) -> None:
        if not 0 < idle_s <= _MAX_IDLE_S or failures < 1:
            raise InvalidRequestError(
                f"idle_s is {idle_s} and failures {failures}; idle_s must be above 0, failures 1 or more",
                hint="idle_s is a year at most: to make no requests, make no KeepWarm",
                value=idle_s,
            )
        self._call = call
        self._idle_s = idle_s
        self._readiness = readiness
        self._failures = failures
        self._changed = threading.Condition()
        self._busy = 0
        self._last_s = time.monotonic()
        self._closed = False
        self._requests = 0
        self._failed_in_a_row = 0
        self._thread = threading.Thread(target=self._run, name="cached-keep-warm", daemon=True)
        self._thread.start()

    @property
    def requests(self) -> int:
        """Synthetic requests that were made, failed ones too."""
        return self._requests

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around a real request: while any runs, and until ``idle_s`` after the last, there is no synthetic one."""
        with self._changed:
            self._busy += 1
        try:
            yield
        finally:
            with self._changed:
                self._busy -= 1
                self._last_s = time.monotonic()
                self._changed.notify_all()

    def close(self) -> None:
        """Makes no more requests; waits for one that runs. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        while self._wait_for_idle():
            if self._readiness is None or self._readiness.ready:
                self._ask()
            with self._changed:
                self._last_s = max(self._last_s, time.monotonic())

    def _wait_for_idle(self) -> bool:
        """False once it is closed."""
        with self._changed:
            while not self._closed:
                left_s = self._last_s + self._idle_s - time.monotonic()
                if not self._busy and left_s <= 0:
                    return True
                self._changed.wait(None if self._busy else left_s)
        return False

    def _ask(self) -> None:
        self._requests += 1
        try:
            self._call()
        except Exception as error:  # noqa: BLE001 whatever the model raises is told, here and by the readiness
            self._failed_in_a_row += 1
            _log.warning("synthetic request %d failed: %r", self._requests, error)
            if self._failed_in_a_row >= self._failures and self._readiness is not None:
                self._readiness.lost(f"{self._failed_in_a_row} synthetic requests failed, the last with {error!r}")
        else:
            self._failed_in_a_row = 0
