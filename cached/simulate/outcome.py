"""What a policy cost over a trace."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, fields
from math import ceil

from cached.level import Level
from cached.simulate.setup import Setup
from cached.simulate.trace import Row


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds are those that attaches waited for bytes; mean and percentiles are over all attaches, 0 for hits in L1.

    ``cold_start_share``: of what a host that keeps nothing but what is preloaded would wait. Percentiles are by nearest
    rank. ``evictions`` counts both levels. A bound knows seconds only; the rest of it is None.
    """

    attaches: int
    l1_hits: int | None
    l2_hits: int | None
    cold_start_s: float
    cold_start_share: float
    mean_s: float
    p90_s: float | None
    p99_s: float | None
    l3_bytes: int | None
    l2_bytes: int | None
    evictions: int | None

    def to_data(self) -> dict[str, float | int | None]:
        """As JSON has it."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


def outcome_of(
    setup: Setup,
    rows: list[Row],
    sources: list[Level],
    preloaded: Container[str],
    *,
    evictions: int,
    prefetched_bytes: int,
) -> Outcome:
    """From where each row's bytes came. ``prefetched_bytes`` came from L3 before anybody asked."""
    waits = [setup.seconds(source, row.size_bytes) for row, source in zip(rows, sources, strict=True)]
    total_s = sum(waits)
    waits.sort()
    return Outcome(
        attaches=len(rows),
        l1_hits=sources.count(Level.L1),
        l2_hits=sources.count(Level.L2),
        cold_start_s=total_s,
        cold_start_share=total_s / all_missed_s(setup, rows, preloaded),
        mean_s=total_s / len(rows),
        p90_s=_percentile(waits, 90),
        p99_s=_percentile(waits, 99),
        l3_bytes=_bytes_from(Level.L3, rows, sources) + prefetched_bytes,
        l2_bytes=_bytes_from(Level.L2, rows, sources),
        evictions=evictions,
    )


def bound_of(setup: Setup, rows: list[Row], preloaded: Container[str], total_s: float) -> Outcome:
    """An outcome of which only the seconds are known."""
    return Outcome(
        attaches=len(rows),
        l1_hits=None,
        l2_hits=None,
        cold_start_s=total_s,
        cold_start_share=total_s / all_missed_s(setup, rows, preloaded),
        mean_s=total_s / len(rows),
        p90_s=None,
        p99_s=None,
        l3_bytes=None,
        l2_bytes=None,
        evictions=None,
    )


def all_missed_s(setup: Setup, rows: list[Row], preloaded: Container[str]) -> float:
    """What would be waited if nothing were ever kept: all bytes from L3, but for models that are in L2 for good."""
    return sum(setup.seconds(Level.L2 if row.model in preloaded else Level.L3, row.size_bytes) for row in rows)


def _percentile(ordered: list[float], percent: int) -> float:
    return ordered[max(0, ceil(len(ordered) * percent / 100) - 1)]


def _bytes_from(level: Level, rows: list[Row], sources: list[Level]) -> int:
    return sum(row.size_bytes for row, source in zip(rows, sources, strict=True) if source is level)
