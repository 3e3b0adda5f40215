"""What happened, for people and programs that watch: a short memory and bounded queues."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

import structlog

from cached.clock import Clock
from cached.logs import redact_text
from cached.tracing import current_trace_id
from cached.types import Event

_log = structlog.get_logger("cached.events")

_REMEMBERED = 500
_QUEUE = 1000
_DECISIONS = 100
_COMMON = frozenset({"lease.opened", "lease.closed", "coldstart.reported"})
"""They come with every worker, and told elsewhere: in the leases that are held, and in the starts that are kept."""
_WRONG = frozenset(
    {"catalog.refused", "config.refused", "damage.found", "l2.write_failed", "load.failed", "origin.blamed"}
)


class EventBus:
    """Loop only. A watcher that does not keep up loses the oldest events, never slows the daemon."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._recent: deque[Event] = deque(maxlen=_REMEMBERED)
        self._decisions: deque[Event] = deque(maxlen=_DECISIONS)
        self._watchers: set[asyncio.Queue[Event]] = set()

    def emit(self, kind: str, message: str, *, name: str = "", revision: str = "", **fields: object) -> None:
        """Logs the event, as an error if it is one that went wrong, and hands it to every watcher.

        It carries the trace id of the request that brought it about, if any did.
        """
        if trace_id := current_trace_id():
            fields["trace_id"] = trace_id
        event = Event(
            time_s=self._clock.wall_s(),
            kind=kind,
            name=name,
            revision=revision,
            message=redact_text(message),
            fields={key: redact_text(str(value)) for key, value in fields.items()},
        )
        # A log line has a level of its own.
        shown = {"at" if key == "level" else key: value for key, value in fields.items()}
        log = _log.error if kind in _WRONG else _log.info
        log(kind, model=name, revision=revision, message=message, **shown)
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
