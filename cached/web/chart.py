"""Starts of workers as bars over time: which phase their ends waited for, when. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cached.types import ColdStart
from cached.units import format_duration
from cached_client.coldstart.breakdown import Breakdown, Row, breakdown
from cached_client.coldstart.picture import seconds
from cached_client.coldstart.spans import Span

GROUPS = {
    "container_start": "process", "process_start": "process", "imports": "process",
    "attach": "weights", "download": "weights", "promote": "weights", "verify": "weights",
    "weights_to_gpu": "device", "cuda_init": "device",
    "compile": "compile",
    "warmup": "warmup", "first_inference": "warmup",
}  # fmt: skip
"""The standard phases, in the few colours that can be told apart."""
_OTHER = "other"
_THINNEST = 0.3


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of a bar, in percent of the longest start that is shown."""

    begin: float
    width: float
    group: str
    told: str
    critical: bool = True


@dataclass(frozen=True, slots=True)
class Phase:
    """A row of a start's own chart: light while it ran, dark while the end waited for it."""

    name: str
    depth: int
    total: str
    critical: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """One start. ``bars`` are its critical path; ``phases`` only those of the latest have."""

    model: str
    client: str
    ago: str
    total: str
    from_level: str
    longest: str
    bars: tuple[Bar, ...]
    phases: tuple[Phase, ...] = ()


def starts_of(starts: Sequence[ColdStart], now_s: float) -> tuple[Start, ...]:
    """The latest first, all to one scale; the phases of the latest one only."""
    found = [breakdown(_spans(start), start.total_s) for start in starts]
    scale = 100 / max((item.total_s for item in found), default=1.0) if any(item.total_s for item in found) else 0.0
    return tuple(
        _start(start, item, scale, now_s, with_phases=number == 0)
        for number, (start, item) in enumerate(zip(starts, found, strict=True))
    )


def _spans(start: ColdStart) -> list[Span]:
    return [
        Span(item.name, item.start_s, item.end_s, item.parent, item.after, item.running, item.failed)
        for item in start.phases
    ]


def _start(start: ColdStart, found: Breakdown, scale: float, now_s: float, *, with_phases: bool) -> Start:
    top = [row for row in found.rows if row.depth == 0]
    groups = _groups(found)
    longest = max(top, key=lambda row: row.waited_s, default=None)
    own_scale = 100 / found.total_s if found.total_s > 0 else 0.0
    return Start(
        model=start.name,
        client=start.client_name or "a worker",
        ago=f"{format_duration(max(0.0, now_s - start.reported_time_s))} ago",
        total=seconds(found.total_s),
        from_level=start.labels.get("from_level", "").upper(),
        longest=f"{longest.name} {seconds(longest.waited_s)}" if longest else "",
        bars=tuple(bar for row in top for bar in _bars(row, groups[id(row)], scale, critical=True)),
        phases=tuple(_phase(row, groups[id(row)], own_scale) for row in found.rows) if with_phases else (),
    )


def _groups(found: Breakdown) -> dict[int, str]:
    """Of each row, by identity, its group: parts belong to what they are parts of."""
    groups, group = {}, _OTHER
    for row in found.rows:
        group = GROUPS.get(row.name, _OTHER) if row.depth == 0 else group
        groups[id(row)] = group
    return groups


def _phase(row: Row, group: str, scale: float) -> Phase:
    name = row.name + (f" x{row.count}" if row.count > 1 else "") + (" (failed)" if row.failed else "")
    bars = (*_bars(row, group, scale, critical=False), *_bars(row, group, scale, critical=True))
    return Phase(name, row.depth, seconds(row.total_s), seconds(row.critical_s), bars)


def _bars(row: Row, group: str, scale: float, *, critical: bool) -> list[Bar]:
    return [
        Bar(
            round(begin_s * scale, 2), round(max(_THINNEST, (end_s - begin_s) * scale), 2), group,
            f"{row.name} {seconds(end_s - begin_s)}", critical,
        )
        for begin_s, end_s in (row.critical if critical else row.intervals)
    ]  # fmt: skip
