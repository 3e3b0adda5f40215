"""The number of ranges in flight, against simulated links: it finds what pays, and leaves what does not."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from cached.transfer.width import Width

RANGE_BYTES = 16 << 20
MB = 1_000_000

Link = Callable[[int], float]
"""Bytes a second that each of n parallel ranges gets."""


def latency_bound(n: int) -> float:
    """A store that gives each connection 90 MB/s, and a NIC of 12.5 GB/s."""
    return min(90 * MB, 12_500 * MB / n)


def saturated_by_four(n: int) -> float:
    return min(400 * MB, 1600 * MB / n)


def worse_when_crowded(n: int) -> float:
    """A host whose processors are at their end with four."""
    return 1600 * MB / max(n, 4) * (1.0 if n <= 4 else (4 / n) ** 0.5)


@dataclass
class Simulation:
    width: Width
    link: Link
    noise: float = 0.1
    seed: int = 1
    now_s: float = 0.0
    moved_bytes: int = 0
    limits: list[int] = field(default_factory=list)

    def run(self, span_s: float, *, demand: int = 10_000) -> float:
        """Keeps as many ranges in flight as allowed and wanted; the throughput in bytes a second."""
        rng = random.Random(self.seed)
        end_s, before = self.now_s + span_s, self.moved_bytes
        flying: list[tuple[float, int, int]] = []
        number = 0
        while self.now_s < end_s:
            while len(flying) < min(self.width.limit, demand):
                number += 1
                share = self.link(min(self.width.limit, demand)) * rng.uniform(1 - self.noise, 1 + self.noise)
                heapq.heappush(flying, (self.now_s + RANGE_BYTES / share, number, self.width.started()))
            full = len(flying) >= self.width.limit
            self.now_s, _, era = heapq.heappop(flying)
            self.moved_bytes += RANGE_BYTES
            self.width.finished(self.now_s, era, RANGE_BYTES, full=full)
            self.limits.append(self.width.limit)
        return (self.moved_bytes - before) / span_s

    def typical(self) -> int:
        """The median of the last half."""
        half = sorted(self.limits[len(self.limits) // 2 :])
        return half[len(half) // 2]


@pytest.mark.parametrize("seed", range(5))
def test_a_link_of_slow_connections_gets_many(seed: int) -> None:
    simulation = Simulation(Width(start=16, high=128), latency_bound, seed=seed)
    simulation.run(20.0)
    assert simulation.typical() >= 64
    assert simulation.run(60.0) >= 0.85 * 128 * 90 * MB


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("link", [saturated_by_four, worse_when_crowded])
def test_a_full_link_or_host_keeps_few(link: Link, seed: int) -> None:
    simulation = Simulation(Width(start=4, high=128), link, seed=seed)
    assert simulation.run(120.0) >= 0.97 * 4 * link(4)
    assert 3 <= simulation.typical() <= 8


def test_too_many_at_first_become_fewer() -> None:
    simulation = Simulation(Width(start=32, high=128), worse_when_crowded)
    simulation.run(300.0)
    assert simulation.typical() <= 8


def test_it_follows_a_link_that_changes() -> None:
    simulation = Simulation(Width(start=4, high=128), saturated_by_four)
    simulation.run(60.0)
    simulation.link = latency_bound
    simulation.run(240.0)
    assert simulation.typical() >= 32


def test_nothing_is_concluded_where_too_little_is_wanted() -> None:
    simulation = Simulation(Width(start=8, high=128), latency_bound)
    simulation.run(60.0, demand=3)
    assert set(simulation.limits) == {8}


def test_it_narrows_when_the_origin_refuses_and_not_twice_for_one_burst() -> None:
    width = Width(start=40, high=128)
    for number in range(30):
        width.refused(10.0 + number / 100)
    assert width.limit == 28
    simulation = Simulation(width, latency_bound, now_s=11.0)
    simulation.run(10.0)
    assert set(simulation.limits) == {28}, "no attempt at more right after"
    simulation.run(60.0)
    assert simulation.typical() > 28


def test_it_stays_within_its_bounds() -> None:
    assert Width(start=64, high=16).limit == 16
    assert Width(start=1, high=1).limit == 1
    width = Width(start=3, high=8)
    for second in range(20):
        width.refused(2.0 * second)
    assert width.limit == 2
