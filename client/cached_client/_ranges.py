"""Which bytes of a file were announced, and which tensors that makes whole. Pure; the caller locks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached_client.safetensors_header import TensorInfo


class RangeSet:
    """A set of byte positions, kept as disjoint ranges ``[begin, end)`` that do not touch, in order."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []

    def add(self, begin: int, end: int) -> None:
        """Adds ``[begin, end)``; what is there already is merged. An empty range adds nothing."""
        if begin >= end:
            return
        first = bisect_left(self._ends, begin)
        last = bisect_right(self._begins, end)
        if first < last:
            begin = min(begin, self._begins[first])
            end = max(end, self._ends[last - 1])
        self._begins[first:last] = [begin]
        self._ends[first:last] = [end]

    def covers(self, begin: int, end: int) -> bool:
        """Whether all of ``[begin, end)`` is in the set; always so for an empty range."""
        if begin >= end:
            return True
        at = bisect_right(self._begins, begin) - 1
        return at >= 0 and self._ends[at] >= end

    def span_at(self, position: int) -> tuple[int, int]:
        """The range that holds a position; an empty one there if none does."""
        at = bisect_right(self._begins, position) - 1
        if at < 0 or self._ends[at] <= position:
            return position, position
        return self._begins[at], self._ends[at]

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """What of ``[begin, end)`` is not in the set, in order."""
        gaps: list[tuple[int, int]] = []
        at = bisect_right(self._ends, begin)
        while begin < end and at < len(self._begins) and self._begins[at] < end:
            if begin < self._begins[at]:
                gaps.append((begin, self._begins[at]))
            begin = self._ends[at]
            at += 1
        if begin < end:
            gaps.append((begin, end))
        return gaps

    def spans(self) -> tuple[tuple[int, int], ...]:
        """The ranges, in order."""
        return tuple(zip(self._begins, self._ends, strict=True))

    def total(self) -> int:
        """How many bytes the set holds."""
        return sum(self._ends) - sum(self._begins)


class PendingTensors:
    """The tensors of a file that were not handed out yet. Cheap to ask often: an MoE model has 19,000 tensors."""

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        self._tensors = sorted(tensors, key=attrgetter("begin"))  # stable: an empty one stays before its neighbour
        self._may_have_empty = True

    def __len__(self) -> int:
        return len(self._tensors)

    def take(self, spans: Iterable[tuple[int, int]]) -> list[TensorInfo]:
        """Removes and returns the tensors that lie wholly within one of ``spans``, in the order of their bytes."""
        taken: list[TensorInfo] = []
        for begin, end in spans:
            first = bisect_left(self._tensors, begin, key=lambda info: info.begin)
            last = bisect_right(self._tensors, end, key=lambda info: info.begin)
            # The tensors do not overlap, so only those at the very end can reach beyond the span.
            while last > first and self._tensors[last - 1].end > end:
                last -= 1
            taken += self._tensors[first:last]
            del self._tensors[first:last]
        return taken

    def take_empty(self) -> list[TensorInfo]:
        """Removes and returns those without bytes: nothing that arrives would ever have them in it."""
        if not self._may_have_empty:
            return []
        self._may_have_empty = False
        empty = [info for info in self._tensors if info.begin == info.end]
        if empty:
            self._tensors = [info for info in self._tensors if info.begin != info.end]
        return empty
