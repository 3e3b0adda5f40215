"""Where the time went: what each phase took, what of that was its own, and what of it anybody had to wait for.

The critical path is found backwards from the end, as in analyses of distributed traces: whoever ended last before a
moment is what that moment waited for. Where a phase says that another one sets its pace (`Span.after`), the time that
both ran counts for that other one. So each instant belongs to exactly one phase, or to none, and the critical parts of
all phases and what is left over add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cached_client.coldstart.spans import Span, contained

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Row:
    """Phases of one name under one parent, taken together. Seconds.

    ``total_s``: while any of them ran. ``self_s``: of that, while none of their parts did. ``critical_s``: of that,
    what the end waited for. ``hidden_s``: the rest of ``self_s``, which ran beside something that took longer.
    """

    name: str
    depth: int
    count: int
    start_s: float
    end_s: float
    total_s: float
    self_s: float
    critical_s: float
    running: bool
    failed: bool
    intervals: tuple[Interval, ...]
    critical: tuple[Interval, ...]
    """When it, or a part of it, was on the critical path."""

    @property
    def waited_s(self) -> float:
        """What the end waited for of it and its parts."""
        return length(self.critical)

    @property
    def hidden_s(self) -> float:
        """Of ``self_s``, what nobody waited for."""
        return max(0.0, self.self_s - self.critical_s)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A whole timeline. ``unaccounted_s``: while no phase ran."""

    total_s: float
    unaccounted_s: float
    rows: tuple[Row, ...]


def breakdown(spans: Sequence[Span], total_s: float | None = None) -> Breakdown:
    """The rows in the order in which they began, each followed by its parts. Without ``total_s``: to the last end."""
    whole = contained(spans)
    end_s = max((span.end_s for span in whole), default=0.0) if total_s is None else total_s
    tree = _Tree(whole)
    owned: dict[int | None, list[Interval]] = {}
    for owner, begin_s, until_s in tree.walk(None, 0.0, end_s):
        owned.setdefault(owner, []).append((begin_s, until_s))
    rows = tuple(_rows(tree, None, 0, owned))
    return Breakdown(end_s, length(owned.get(None, ())), rows)


class _Tree:
    """Spans and their parts."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans
        self.parts: dict[int | None, list[int]] = {}
        for index, span in enumerate(spans):
            self.parts.setdefault(span.parent, []).append(index)

    def walk(self, owner: int | None, begin_s: float, end_s: float) -> Iterator[tuple[int | None, float, float]]:
        """``(span, from, to)`` of the critical path within a time of ``owner``, the last first."""
        level = [index for index in self.parts.get(owner, ()) if self.spans[index].total_s > 0]
        at_s = end_s
        while at_s > begin_s:
            step = self._step(level, at_s, begin_s)
            if step is None:
                yield owner, begin_s, at_s
                return
            index, from_s, to_s = step
            if to_s < at_s:
                yield owner, to_s, at_s
            yield from self.walk(index, from_s, to_s)
            at_s = from_s

    def _step(self, level: list[int], at_s: float, begin_s: float) -> tuple[int, float, float] | None:
        """What the moment ``at_s`` waited for, and since when."""
        spans = self.spans
        ended = [index for index in level if begin_s < spans[index].end_s <= at_s]
        last = max(ended, key=lambda index: (spans[index].end_s, -spans[index].start_s), default=None)
        ended_s = begin_s if last is None else spans[last].end_s
        going = [index for index in level if spans[index].start_s < at_s < spans[index].end_s]
        if last is not None and (ended_s == at_s or not going):
            return last, max(begin_s, spans[last].start_s, self._paced(level, last, ended_s)), ended_s
        if not going:
            return None
        first = min(going, key=lambda index: spans[index].start_s)
        return first, max(spans[first].start_s, ended_s, self._paced(level, first, at_s)), at_s

    def _paced(self, level: list[int], index: int, until_s: float) -> float:
        """When the last of those that set this span's pace had ended."""
        span = self.spans[index]
        ends = [
            self.spans[other].end_s
            for other in level
            if span.after and self.spans[other].name == span.after and other != index
        ]
        return max((end_s for end_s in ends if span.start_s < end_s < until_s), default=0.0)


def _rows(tree: _Tree, parent: int | None, depth: int, owned: dict[int | None, list[Interval]]) -> Iterator[Row]:
    groups: dict[str, list[int]] = {}
    for index in sorted(tree.parts.get(parent, ()), key=lambda index: tree.spans[index].start_s):
        groups.setdefault(tree.spans[index].name, []).append(index)
    for name, members in groups.items():
        spans = [tree.spans[index] for index in members]
        intervals = union((span.start_s, span.end_s) for span in spans)
        total_s = length(intervals)
        yield Row(
            name=name,
            depth=depth,
            count=len(members),
            start_s=intervals[0][0],
            end_s=intervals[-1][1],
            total_s=total_s,
            self_s=length(union(pair for index in members for pair in _own(tree, index))),
            critical_s=sum(length(owned.get(index, ())) for index in members),
            running=any(span.running for span in spans),
            failed=any(span.failed for span in spans),
            intervals=intervals,
            critical=union(pair for index in members for pair in _critical(tree, index, owned)),
        )
        for index in members:
            yield from _rows(tree, index, depth + 1, owned)


def _own(tree: _Tree, index: int) -> Iterator[Interval]:
    """When a span ran and none of its parts did."""
    span = tree.spans[index]
    at_s = span.start_s
    parts = [tree.spans[part] for part in tree.parts.get(index, ())]
    for begin_s, end_s in union((part.start_s, part.end_s) for part in parts):
        yield at_s, begin_s
        at_s = end_s
    yield at_s, span.end_s


def _critical(tree: _Tree, index: int, owned: dict[int | None, list[Interval]]) -> Iterator[Interval]:
    yield from owned.get(index, ())
    for part in tree.parts.get(index, ()):
        yield from _critical(tree, part, owned)


def union(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The same time without overlaps, in order."""
    found: list[Interval] = []
    for begin_s, end_s in sorted(intervals):
        if found and begin_s <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end_s))
        else:
            found.append((begin_s, end_s))
    return tuple(found)


def length(intervals: Iterable[Interval]) -> float:
    """Seconds of intervals that do not overlap."""
    return sum(end_s - begin_s for begin_s, end_s in intervals)
