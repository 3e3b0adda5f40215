"""What happened, for people and programs that watch: a short memory and bounded queues."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Mapping
from typing import Literal

import structlog

from cached.clock import Clock
from cached.logs import redact_text
from cached.tracing import current_trace_id
from cached.types import Event

_log = structlog.get_logger("cached.events")

Severity = Literal["info", "warning", "error"]

_REMEMBERED = 500
_QUEUE = 1000
_DECISIONS = 100
_COMMON = frozenset({"lease.opened", "lease.closed", "coldstart.reported", "rpc.refused", "descriptors.refused"})
"""They come with every worker, and told elsewhere: in the leases that are held, in the starts that are kept, and to who
asked."""


class EventBus:
    """Loop only. A watcher that does not keep up loses the oldest events, never slows the daemon."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent: deque[Event] = deque(maxlen=_REMEMBERED)
        self._decisions: deque[Event] = deque(maxlen=_DECISIONS)
        self._watchers: set[asyncio.Queue[Event]] = set()

    def emit(self, kind: str, message: str, *, name: str = "", revision: str = "", **fields: object) -> None:
        """Logs the event and hands it to every watcher; failures come by way of ``cache.failures``.

        It carries the trace id of the request that brought it about, if any did.
        """
        self.tell(kind, message, name, revision, fields)

    def tell(
        self,
        kind: str,
        message: str,
        name: str,
        revision: str,
        fields: Mapping[str, object],
        *,
        severity: Severity = "info",
        remembered: bool = True,
    ) -> None:
        """As ``emit``. ``severity``: of the log line. ``remembered`` False: it is only logged."""
        trace_id = current_trace_id()
        fields = {**fields, **({"trace_id": trace_id} if trace_id else {})}
        # A log line has a level of its own.
        shown = {"at" if key == "level" else key: value for key, value in fields.items()}
        getattr(_log, severity)(kind, model=name, revision=revision, message=message, **shown)
        if not remembered:
            return
        event = Event(
            time_s=self._clock.wall_s(),
            kind=kind,
            name=name,
            revision=revision,
            message=redact_text(message),
            fields={key: redact_text(str(value)) for key, value in fields.items()},
        )
        self._recent.append(event)
        if kind not in _COMMON:
            self._decisions.append(event)
        for queue in self._watchers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    @property
    def recent(self) -> tuple[Event, ...]:
        """Those that are still remembered, the oldest first."""
        return tuple(self._recent)

    @property
    def decisions(self) -> tuple[Event, ...]:
        """The last ones without what comes with every worker, so that a thousand of those do not hide them."""
        return tuple(self._decisions)

    async def watch(self, *, replay: bool) -> AsyncIterator[Event]:
        """Events from now on, after those still remembered if ``replay``; until the caller stops iterating."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_QUEUE)
        if replay:
            for event in self._recent:
                queue.put_nowait(event)
        self._watchers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._watchers.discard(queue)
