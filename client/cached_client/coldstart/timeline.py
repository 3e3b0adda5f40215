"""The timeline of one start: phases are begun and ended from any thread, and read at any time."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from cached_client.coldstart.breakdown import Breakdown, breakdown
from cached_client.coldstart.picture import chart, svg, table
from cached_client.coldstart.process import age_s, container_age_s
from cached_client.coldstart.spans import MAX_DEPTH, MAX_SPANS, Span, check_labels, check_phase
from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

    from cached_client.attach import Model
    from cached_client.cache import Cache

_CONTAINER_WITHIN_S = 300.0
_TICK_S = 0.01
"""The kernel tells starts to this: the container's first process may be this one."""

_ARRIVES_AS = {"l3": "download", "l2": "promote"}
_current: ContextVar[Phase | None] = ContextVar("cached_client_phase", default=None)


class Phase:
    """A phase that was begun. `end` ends it, from any thread; as a context manager it ends with the block."""

    def __init__(self, timeline: Timeline, index: int | None) -> None:
        """For `Timeline.begin`."""
        self._timeline = timeline
        self._index = index

    @property
    def index(self) -> int | None:
        """Its place in the timeline; None if it had no room there."""
        return self._index

    def belongs_to(self, timeline: Timeline) -> bool:
        """Whether it is a phase of that timeline."""
        return self._timeline is timeline

    def end(self, *, failed: bool = False) -> None:
        """It is over. The first call counts."""
        self._timeline._end(self._index, failed=failed)  # noqa: SLF001 the two are one

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(failed=kind is not None)


class Timeline:
    """Where the time of a start goes. Any thread may use it.

    It begins when this process was started, which /proc tells to 10 ms, so that the interpreter and what was imported
    before are in it: phase ``process_start``. In a container whose first process is not older than five minutes it
    begins with that: ``container_start``; who restarts a worker within an old container does not wait for it again.

    Args:
        since_process_start: False for a load within a process that has long been running: it begins now.
        requested_time_s: when the start was asked for, in Unix time, where an orchestrator tells: it begins then.
        labels: what distinguishes this start from others, such as ``engine`` or ``gpu``; `label` adds more.
    """

    def __init__(
        self,
        *,
        since_process_start: bool = True,
        requested_time_s: float | None = None,
        labels: dict[str, str] | None = None,
    ) -> None:
        now_s = time.monotonic()
        self._lock = threading.Lock()
        self._spans: list[Span] = []  # times are those of time.monotonic() here
        self._dropped = 0
        self._labels = check_labels(labels or {})
        self._model = ("", "")
        process_age_s = age_s() if since_process_start else None
        self._begin_s = now_s if process_age_s is None else now_s - process_age_s
        asked_s = _asked_for(process_age_s or 0.0, requested_time_s, inside=since_process_start)
        if asked_s is not None:
            self.add("container_start", now_s - asked_s, self._begin_s)
            self._begin_s = now_s - asked_s
        if process_age_s is not None:
            self.add("process_start", now_s - process_age_s, now_s)
        self.started_time_s: float = time.time() - (now_s - self._begin_s)
        """When it began, in Unix time."""

    # Recording.

    @contextmanager
    def phase(self, name: str, *, parent: Phase | None = None, after: str = "") -> Iterator[Phase]:
        """The phase ``name`` for as long as the block runs; a part of the one that this block is within.

        A thread begins with none: there ``parent`` may name one; another timeline's is none here. ``after``: the phase
        whose pace this one keeps where both run, as a copy to the device does with the download that it consumes.
        Raises InvalidRequestError for a name that cannot be one.
        """
        around = parent or _current.get()
        phase = self.begin(name, parent=around, after=after)
        token = _current.set(phase if phase.index is not None else around)
        try:
            with phase:
                yield phase
        finally:
            _current.reset(token)

    def begin(self, name: str, *, parent: Phase | None = None, after: str = "") -> Phase:
        """As `phase`, for what ends elsewhere: a part of ``parent`` alone, ended by `Phase.end`."""
        now_s = time.monotonic()
        span = Span(check_phase(name), now_s, now_s, self._index_of(parent), after and check_phase(after), True)
        return Phase(self, self._append(span))

    def add(self, name: str, start_s: float, end_s: float, *, parent: Phase | None = None, after: str = "") -> Phase:
        """A phase that is over. Its times are those of ``time.monotonic()``. Raises InvalidRequestError."""
        if not start_s <= end_s:
            raise InvalidRequestError(f"the phase {name} ends before it begins", value=name)
        span = Span(check_phase(name), start_s, end_s, self._index_of(parent), after and check_phase(after))
        return Phase(self, self._append(span))

    def add_model(self, model: Model) -> None:
        """What is known of an attached model's load: attach, download or promote, verify, weights_to_gpu.

        Call it once it is loaded. What is a part of nothing else overlaps with whatever the worker did meanwhile. The
        model becomes the one that `report` tells of, and where it came from becomes the label ``from_level``.
        """
        timings, report, began_s = model.timings, model.report, model.attach_started_s
        opened_s = began_s + timings.get("opened", 0.0)
        complete_s = began_s + timings["complete"] if "complete" in timings else time.monotonic()
        last_s = min(complete_s, began_s + timings.get("last_range", timings.get("opened", 0.0)))
        arrives = _ARRIVES_AS.get(report.from_level if report else "l3", "")
        self.add("attach", began_s, opened_s)
        if arrives and last_s > opened_s:
            self.add(arrives, opened_s, last_s)
        if report is not None and last_s < complete_s and "first_range" in timings:
            self.add("verify", max(opened_s, last_s), complete_s)
        device = model.device_report
        if device is not None and "device_complete" in timings:
            end_s = began_s + timings["device_complete"]
            self.add("weights_to_gpu", max(opened_s, end_s - device.seconds), end_s, after=arrives)
        with self._lock:
            self._model = (model.name, model.revision)
        self.label(from_level=report.from_level if report else "", gpu=device.device if device else "")

    def label(self, **labels: str) -> None:
        """Adds labels; one with an empty text is left out. Raises InvalidRequestError."""
        with self._lock:
            self._labels = check_labels({**self._labels, **{key: value for key, value in labels.items() if value}})

    def _index_of(self, parent: Phase | None) -> int | None:
        """Only a phase of this timeline has a place in it: another one's index is of another phase here, or of none."""
        return parent.index if parent and parent.belongs_to(self) else None

    def _append(self, span: Span) -> int | None:
        with self._lock:
            if len(self._spans) >= MAX_SPANS:
                self._dropped += 1
                return None
            if span.parent is not None and self._depth(span.parent) + 1 >= MAX_DEPTH:
                span = replace(span, parent=self._spans[span.parent].parent)
            self._spans.append(span)
            return len(self._spans) - 1

    def _depth(self, index: int) -> int:
        parent = self._spans[index].parent
        return 0 if parent is None else self._depth(parent) + 1

    def _end(self, index: int | None, *, failed: bool) -> None:
        now_s = time.monotonic()
        with self._lock:
            if index is not None and self._spans[index].running:
                self._spans[index] = replace(self._spans[index], end_s=now_s, running=False, failed=failed)

    # Reading.

    @property
    def labels(self) -> dict[str, str]:
        """What distinguishes this start from others."""
        with self._lock:
            return dict(self._labels)

    @property
    def dropped(self) -> int:
        """Phases that had no room: 64 are kept."""
        return self._dropped

    def spans(self) -> list[Span]:
        """The phases as they are now, in the order in which they were begun or added."""
        now_s = time.monotonic()
        with self._lock:
            spans = list(self._spans)
        return [
            replace(
                span,
                start_s=max(0.0, span.start_s - self._begin_s),
                end_s=max(0.0, (now_s if span.running else span.end_s) - self._begin_s),
            )
            for span in spans
        ]

    def breakdown(self) -> Breakdown:
        """Totals, own times, the critical path; to the end of the last phase."""
        return breakdown(self.spans())

    @property
    def total_s(self) -> float:
        """From its begin to the end of the last phase."""
        return self.breakdown().total_s

    def table(self) -> str:
        """The phases as a table for people."""
        return table(self.breakdown())

    def chart(self, width: int = 100, *, ascii_only: bool = False) -> str:
        """The phases as bars in ``width`` columns of text; what is on the critical path is solid."""
        return chart(self.breakdown(), width, ascii_only=ascii_only)

    def svg(self, title: str = "") -> str:
        """The same as a picture: one SVG document without references to anything else."""
        return svg(self.breakdown(), title or f"Cold start of {self._model[0] or 'a worker'}")

    def to_dict(self) -> dict[str, object]:
        """Plain data: begin, labels, phases as they were recorded, and what follows from them."""
        spans = self.spans()
        found = breakdown(spans)
        return {
            "model": self._model[0],
            "revision": self._model[1],
            "started_time_s": self.started_time_s,
            "total_s": found.total_s,
            "unaccounted_s": found.unaccounted_s,
            "labels": self.labels,
            "dropped_phases": self._dropped,
            "phases": [asdict(span) for span in spans],
            "rows": [{**asdict(row), "hidden_s": row.hidden_s} for row in found.rows],
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def report(
        self, cache: Cache, name: str = "", *, client_name: str | None = None, timeout_s: float | None = None
    ) -> None:
        """Sends it to the daemon, which keeps the last ones of each model: see `cached coldstart`.

        ``name``: the model, where `add_model` did not tell; the daemon must know it. Phases that still run are cut at
        this moment. Raises CacheError: a worker that can do without should catch it.
        """
        from cached_client._proto import cached_pb2 as pb
        from cached_client.coldstart.message import to_message

        model, revision = self._model
        if not (name or model):
            raise InvalidRequestError("the timeline does not know its model", hint="add_model first, or give name")
        program = os.path.basename(sys.argv[0]) if sys.argv and sys.argv[0] else "python"
        message = to_message(self.spans(), self.labels)
        message.name = name or model
        message.revision = revision if name in ("", model) else ""
        message.client_name = (program if client_name is None else client_name)[:256]
        message.started_time_s = self.started_time_s
        message.total_s = self.total_s
        request = pb.ReportColdStartRequest(cold_start=message)
        cache.connection.call(cache.connection.stub.ReportColdStart, request, timeout_s=timeout_s)


def _asked_for(process_age_s: float, requested_time_s: float | None, *, inside: bool) -> float | None:
    """How many seconds ago the start was asked for, if that was before this process began."""
    if requested_time_s is not None:
        ago_s = time.time() - requested_time_s
        return ago_s if ago_s > process_age_s else None
    container_s = container_age_s() if inside else None
    if container_s is None or not process_age_s + _TICK_S < container_s <= process_age_s + _CONTAINER_WITHIN_S:
        return None
    return container_s
