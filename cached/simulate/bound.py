"""What no policy can do better than, knowing all of the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from cached.level import Level
from cached.simulate.setup import Setup
from cached.simulate.trace import Row

_WORK = 1_500_000  # rows x steps: some seconds
_MIN_STEPS, _MAX_STEPS = 60, 400
_PATIENCE = 8  # steps without a better bound after which they are made shorter
_GB = 1e9  # prices are for a GB, so that they are of the order of a second


def least_cold_start_s(setup: Setup, rows: Sequence[Row], preloaded: frozenset[str]) -> float:
    """A lower bound on the cold-start seconds of *every* way to fill both levels, with all of the future known.

    Between two attaches of a model its bytes may lie in L1 (the second attach is then free), in L2 (it costs the hop
    from there), or nowhere; at no time may more bytes lie at a level than it has. The bound allows more than a host
    can do: to keep fractions of models, to hold what is being attached outside of both levels, and to have a model in
    L1 that is not in L2. So it may lie below what can be reached. It is the Lagrangian dual of that linear programme:
    *any* prices for the bytes of each level at each time give a valid bound, and the steps of a subgradient method
    only make it tighter. First attaches pay the full way; leases are taken to be short, and tiers are not heeded.
    """
    base_s, gaps = _gaps(setup, rows, preloaded)
    capacities = [setup.l1_bytes / _GB] + ([] if setup.preloaded is not None else [setup.l2_bytes / _GB])
    prices = [[0.0] * len(rows) for _ in capacities]
    least_s = sum(max(gap.saves_s) for gap in gaps)  # the bound on what can be saved, at prices of zero
    stride_s = least_s * 0.1
    waited = 0
    for _ in range(min(_MAX_STEPS, max(_MIN_STEPS, _WORK // len(rows)))):
        saved_s, slack = _dual(gaps, capacities, prices)
        waited = 0 if saved_s < least_s else waited + 1
        least_s = min(least_s, saved_s)
        if waited > _PATIENCE:
            stride_s, waited = stride_s / 2, 0
        norm = sum(
            free * free
            for level, frees in zip(prices, slack, strict=True)
            for price, free in zip(level, frees, strict=True)
            if price > 0 or free < 0
        )
        if not norm:
            break
        length = (saved_s - least_s + stride_s) / norm
        prices = [
            [max(0.0, price - length * free) for price, free in zip(level, frees, strict=True)]
            for level, frees in zip(prices, slack, strict=True)
        ]
    return max(0.0, base_s - least_s)


@dataclass(frozen=True, slots=True)
class _Gap:
    """From an attach (row ``begin``) to the model's next (row ``end``). ``saves_s``: by lying in L1, in L2."""

    begin: int
    end: int
    size_gb: float
    saves_s: tuple[float, ...]


def _gaps(setup: Setup, rows: Sequence[Row], preloaded: frozenset[str]) -> tuple[float, list[_Gap]]:
    """The seconds that a host pays which keeps nothing, and where it could save."""
    last: dict[tuple[str, int], int] = {}
    gaps, base_s = [], 0.0
    for index, row in enumerate(rows):
        content = (row.model, row.size_bytes)
        nothing_s = setup.seconds(Level.L2 if row.model in preloaded else Level.L3, row.size_bytes)
        base_s += nothing_s
        if content in last:
            in_l1 = nothing_s if row.size_bytes <= setup.l1_bytes else 0.0
            saves_s = [in_l1]
            if setup.preloaded is None:
                in_l2 = max(0.0, nothing_s - setup.seconds(Level.L2, row.size_bytes))
                saves_s.append(in_l2 if row.size_bytes <= setup.l2_bytes else 0.0)
            gaps.append(_Gap(last[content], index, row.size_bytes / _GB, tuple(saves_s)))
        last[content] = index
    return base_s, gaps


def _dual(gaps: list[_Gap], capacities: list[float], prices: list[list[float]]) -> tuple[float, list[list[float]]]:
    """A bound on what can be saved at these prices, and how much of each level is free at each time if all optimise."""
    sums = [[0.0, *accumulate(level)] for level in prices]
    taken = [[0.0] * (len(level) + 1) for level in prices]
    saved_s = sum(capacity * level[-1] for capacity, level in zip(capacities, sums, strict=True))
    for gap in gaps:
        begin, end, size_gb = gap.begin, gap.end, gap.size_gb
        best_s, best = 0.0, -1
        for index, saves_s in enumerate(gap.saves_s):
            level = sums[index]
            gain_s = saves_s - size_gb * (level[end] - level[begin])
            if gain_s > best_s:
                best_s, best = gain_s, index
        if best >= 0:
            saved_s += best_s
            taken[best][begin] += size_gb
            taken[best][end] -= size_gb
    slack = [
        [capacity - used for used in accumulate(level[:-1])] for capacity, level in zip(capacities, taken, strict=True)
    ]
    return saved_s, slack
