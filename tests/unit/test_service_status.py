from __future__ import annotations

from dataclasses import replace

import pytest

from cached.level import Level
from cached.service_status import drain_line, status_line
from cached.types import LevelStats, PullPhase, PullProgress, Stats

GIB = 2**30
L1 = LevelStats(Level.L1, 128 * GIB, 42 * GIB, 0, 0, 0, 3, "configured 128GiB")
L2 = LevelStats(Level.L2, 3 * 1024 * GIB, 1229 * GIB, 0, 0, 0, 9, "configured 80%")
STATS = Stats((L1, L2), {}, 3, 5, 1, 1, 10.0, "1", (), "abc")
PULL = PullProgress(PullPhase.TRANSFERRING, "llama", "r1", 100 * GIB, 37 * GIB, 36 * GIB, 0, GIB)


def test_what_is_where_and_what_moves() -> None:
    assert status_line(STATS, [PULL]) == "L1 42.0/128 GiB, L2 1.2/3.0 TiB, 3 leases, pulling llama 37 %"
    assert status_line(replace(STATS, levels=(L1,), lease_count=1), []) == "L1 42.0/128 GiB, 1 lease"
    assert status_line(replace(STATS, levels=(replace(L1, used_bytes=0),), lease_count=0), []).startswith(
        "L1 0/128 GiB"
    )
    assert status_line(replace(STATS, levels=(replace(L1, capacity_bytes=0),)), []).startswith("L1 0/0 B")


def test_what_is_wrong_comes_first() -> None:
    stats = replace(STATS, degraded=("l2 is read-only", "the index cannot be written"))
    line = status_line(stats, [], ["the new settings are refused"])
    assert line.startswith("the new settings are refused, degraded: l2 is read-only and 1 more, L1 42.0/128 GiB")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (replace(PULL, origin_bytes=0, done_bytes=0, reused_bytes=0), "beginning llama 0 %"),
        (replace(PULL, origin_bytes=0, disk_bytes=37 * GIB), "promoting llama 37 %"),
        (replace(PULL, origin_bytes=0), "checking llama 37 %"),
        (replace(PULL, total_bytes=0, done_bytes=0), "pulling llama"),
        (replace(PULL, from_level=Level.L3), "recording llama"),
    ],
)
def test_loads_by_what_they_do(load: PullProgress, said: str) -> None:
    assert status_line(STATS, [load]).endswith(f", {said}")


def test_many_loads_are_counted_the_largest_first() -> None:
    loads = [replace(PULL, name=f"m{number}", total_bytes=number * 37 * GIB) for number in range(1, 6)]
    assert status_line(STATS, loads).endswith(", pulling m5 20 %, pulling m4 25 % and 3 more")


def test_a_drain_says_what_it_waits_for() -> None:
    assert drain_line([PULL], 0, 17.6) == "draining: pulling llama 37 %, 18 s left"
    assert drain_line([PULL], 2, -1) == "draining: pulling llama 37 %, 0 s left; 2 leases will be taken up again"
    assert drain_line([], 1, 20) == "stopping; 1 lease will be taken up again"
