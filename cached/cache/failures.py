"""The one place where failures are counted, logged and told as events, each once however many meet it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog

from cached.cache.events import EventBus, Severity
from cached.clock import Clock
from cached.errors import CachedError
from cached.failures import OTHER, PARTS, Whose, kind_of
from cached.metrics import Metrics
from cached.tracing import current_trace_id

_log = structlog.get_logger(__name__)

_BURST, _BURST_S = 20, 10.0
"""Events of refused calls of one reason: what clients do must not drive everything else out of the memory."""

_PASSING = frozenset({"origin.blamed", "origin.skipped", "l2.skipped"})
"""Kinds that cost nobody anything yet: warnings."""

_MOST_CHARS = 1000
_OF_EVENTS = frozenset({"kind", "message", "name", "revision", "reason", "chain"})
"""What an event says by itself; fields of an error that are called so are left out."""


class Failures:
    """Loop only."""

    def __init__(self, events: EventBus, metrics: Metrics, clock: Clock) -> None:
        self._events = events
        self._metrics = metrics
        self._clock = clock
        self._bursts: dict[str, tuple[float, int]] = {}
        self.degraded = Degraded(self)

    def report(
        self,
        kind: str,
        error: CachedError,
        message: str = "",
        /,
        *,
        name: str = "",
        revision: str = "",
        **fields: object,
    ) -> None:
        """Something failed with ``error``: an event of this ``kind``, with the error's fields, and a log line.

        ``name``, ``revision``: of the model. ``message``: what it means, if not what the error says.
        """
        self._count(error)
        severity: Severity = "warning" if kind in _PASSING else "error"
        self._events.tell(kind, message or error.message, name, revision, _told(error, fields), severity=severity)

    def refused(self, kind: str, error: CachedError, /, **fields: object) -> None:
        """A request ended with ``error``. The log has each; what was reported before is neither counted nor told."""
        new = not error.told
        if new:
            self._count(error)
        mild = kind_of(error.reason).whose is Whose.CALLER or error.reason == "UNAVAILABLE"
        self._events.tell(
            kind, clipped(error.message), clipped(error.fields.get("ref", "")), "", _told(error, fields),
            severity="info" if mild else "warning", remembered=new and self._has_turn(error.reason),
        )  # fmt: skip

    def background(self, what: str, error: CachedError, /, *, known: bool = False, **fields: object) -> None:
        """Work that nobody waits for failed. ``known``: in the same way as before."""
        self._count(error)
        self._events.tell(
            "background.failed", f"{what}: {error.message}", "", "", _told(error, {"work": what} | fields),
            severity="warning", remembered=not known,
        )  # fmt: skip

    @contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """What is inside may fail: that is told, and goes no further."""
        try:
            yield
        except CachedError as error:
            self.background(what, error)
        except Exception as bug:  # noqa: BLE001 - told
            self.bug(what, bug)

    def bug(
        self, where: str, bug: BaseException, /, *, name: str = "", known: bool = False, **fields: object
    ) -> CachedError:
        """An exception that nobody foresaw: its traceback goes to the log, once. The error that callers may see.

        They see nothing of it but the trace id that the log line has, too. ``name``: the model's. ``known``: the same
        was told just before.
        """
        trace_id = current_trace_id()
        found = f" | grep {trace_id}" if trace_id else ""
        error = CachedError(
            "an internal error", hint=f"report it with the traceback in the daemon's log: journalctl -u cached{found}"
        )
        if trace_id:
            error.fields["trace_id"] = trace_id
        error.__cause__ = bug
        self._count(error)
        if not known:
            _log.error("internal.traceback", where=where, model=name, exc_info=bug, **fields)
        self._events.tell(
            "internal.error", f"{where}: {error.chain}", name, "", _told(error, {"where": where} | fields),
            severity="error", remembered=not known,
        )  # fmt: skip
        return error

    def began(self, part: str, why: str, error: CachedError | None) -> None:
        """A part of the daemon does not work as it should, and did before."""
        reason = error.reason if error is not None else PARTS.get(part, PARTS[OTHER]).reason
        if error is None or not error.told:
            self._metrics.failures.labels(reason=reason).inc()
        if error is not None:
            error.told = True
        chain = error.chain if error is not None else why
        fields = {"part": part, "reason": reason, "chain": chain}
        self._events.tell("degraded.began", why, "", "", fields, severity="error")

    def ended(self, part: str) -> None:
        """It works again."""
        self._events.emit("degraded.ended", f"{part} works again", part=part)

    def _count(self, error: CachedError) -> None:
        error.told = True
        self._metrics.failures.labels(reason=kind_of(error.reason).reason).inc()

    def _has_turn(self, reason: str) -> bool:
        now_s = self._clock.monotonic_s()
        began_s, count = self._bursts.get(reason, (now_s, 0))
        if now_s - began_s >= _BURST_S:
            began_s, count = now_s, 0
        self._bursts[reason] = (began_s, count + 1)
        return count < _BURST


class Degraded(Mapping[str, str]):
    """What does not work as it should → why, for health; empty when all is well. Keys are those of PARTS."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._why: dict[str, str] = {}

    def began(self, part: str, why: str, error: CachedError | None = None) -> None:
        """It is so, or still is; the first time is told."""
        new = part not in self._why
        self._why[part] = why
        if new:
            self._failures.began(part, why, error)

    def ended(self, part: str) -> None:
        """It is well; told if it was not."""
        if self._why.pop(part, None) is not None:
            self._failures.ended(part)

    def __getitem__(self, part: str) -> str:
        return self._why[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._why)

    def __len__(self) -> int:
        return len(self._why)


def _told(error: CachedError, fields: Mapping[str, object]) -> dict[str, object]:
    """Reason, chain of causes and fields of an error; what the caller says goes before, unless it is None."""
    own = {key: clipped(value) for key, value in error.fields.items() if key not in _OF_EVENTS}
    said = {key: value for key, value in fields.items() if value is not None}
    return {**own, **said, "reason": error.reason, "chain": error.chain}


def clipped(text: str) -> str:
    """What a client sent may be long, and events are kept."""
    return text if len(text) <= _MOST_CHARS else f"{text[:_MOST_CHARS]}…"
