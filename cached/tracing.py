"""Trace ids: which request brought about what. Spans go nowhere here; the tracer that exports them is telemetry's.

Every request to the daemon has a trace id: the caller's own, where it sent one as W3C trace context
(https://www.w3.org/TR/trace-context/), else a new one. Log lines, events and exemplars carry it. It follows the request
into the tasks that it starts, as context variables do.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Self

Attributes = Mapping[str, str | int | float]

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_current: ContextVar[str] = ContextVar("cached_trace_id", default="")


def current_trace_id() -> str:
    """The trace id of what this task works on, 32 hex digits; empty outside of any."""
    return _current.get()


def trace_id_of(traceparent: str) -> str:
    """The trace id in a ``traceparent`` header, or empty if it is none."""
    match = _TRACEPARENT.fullmatch(traceparent)
    return match[1] if match else ""


@contextlib.contextmanager
def carrying(trace_id: str) -> Iterator[None]:
    """While inside, log lines carry this trace id, and so do the tasks that are started."""
    token = _current.set(trace_id)
    try:
        yield
    finally:
        _current.reset(token)


class Span:
    """A piece of work of a trace. As a context manager it is that of what is inside, and ends with it.

    One that goes on after the block, or in other tasks, is made current with ``active``, and ended by hand.
    """

    def __init__(self, trace_id: str) -> None:
        self.trace_id = trace_id
        self._entered = contextlib.ExitStack()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """While inside, what is started is a part of this span."""
        return carrying(self.trace_id)

    def set(self, attributes: Attributes) -> None:
        """Adds to what is told of it."""

    def event(self, name: str) -> None:
        """Something happened in it now."""

    def link(self, other: Span) -> None:
        """It waits for what another request had begun."""

    def fail(self, error: BaseException) -> None:
        """It did not do what it was for."""

    def end(self) -> None:
        """It is over; idempotent."""

    def __enter__(self) -> Self:
        self._entered.enter_context(self.active())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self.fail(error)
        self._entered.close()
        self.end()


class Tracer:
    """Gives ids, and spans that nobody collects. Loop only."""

    def request(
        self,
        headers: Mapping[str, str],
        attributes: Attributes,  # noqa: ARG002 for those who tell
    ) -> contextlib.AbstractContextManager[None]:
        """Around a request: its trace is the caller's, if ``headers`` has a ``traceparent``, else a new one.

        ``attributes`` are those of the spans that answer it.
        """
        return carrying(trace_id_of(headers.get("traceparent", "")) or _new_trace_id())

    def start(self, name: str, attributes: Attributes = {}, *, server: bool = False) -> Span:  # noqa: ARG002, B006
        """A span that begins now, within the current one. ``server``: it answers a request of another process."""
        return Span(current_trace_id() or _new_trace_id())

    def close(self) -> None:
        """Sends what is left, for a few seconds at most. It blocks: beside the loop."""


def _new_trace_id() -> str:
    return secrets.token_hex(16)
