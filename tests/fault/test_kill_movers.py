"""SIGKILL at exact system calls of a mover: the process that writes the bytes of segments and files.

Alone, at the Nth call, which is not made: the daemon gives its ranges to another, and nobody notices. Or with the
daemon, just after the Nth call: ``strace`` stops the mover there, the daemon is killed, and the kernel kills the mover
with it. What is there then is what had been written until that call, and the next daemon is checked whole.

``FAULT_POINTS=n`` sets how many points of each call are tried; ``FAULT_POINT=pwritev2:7`` repeats one.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor, Future
from contextlib import suppress

import psutil
import pytest

from tests.fault.strace import Calls, is_alive, traced, wait_until_written
from tests.fault.test_kill_points import (
    LIFE,
    LIFE_S,
    ONLY,
    POINTS,
    begin,
    clear,
    live,
    spread,
    try_points,
)
from tests.integration.harness import wait_for
from tests.integration.support import Site
from tests.invariants import check_at_rest

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240 + 60 * POINTS)]
CALLS = ("fcntl", "openat", "preadv2", "pwritev2", "recvfrom", "write")
"""What a mover makes to open files of both levels, to read and write them, to hear the origin, and to answer."""


def mover_of(site: Site) -> int:
    (mover,) = psutil.Process(site.daemon.pid).children()
    return mover.pid


def points_of(site: Site, call: str) -> list[int]:
    """Numbers of this call in the life of a mover, up to the most that one of its threads makes."""
    if ONLY.startswith(f"{call}:"):
        return [int(ONLY.partition(":")[2])]
    log = site.folder / "all.log"
    with traced(mover_of(site), log, calls=[call]):
        live(site, site.daemon.pid, set())
    most = Calls(log).reached()[call]
    assert most, f"movers make no {call} any more"
    return spread(most, POINTS)


@pytest.mark.parametrize("call", CALLS)
def test_killed_alone_nobody_notices(site: Site, call: str, fault_point: Callable[[str], None]) -> None:
    begin(site)
    reached = 0
    numbers = points_of(site, call)
    for number in numbers:
        clear(site)
        log = site.folder / "strace.log"
        mover, inject = mover_of(site), f"{call}:signal=KILL:when={number}"
        before = restarts(site)
        with traced(mover, log, calls=[call], inject=inject) as tracer:
            for _, act in LIFE:
                act(site)  # none is refused
            if not is_alive(mover):
                wait_until_written(tracer)
        what = "" if is_alive(mover) else Calls(log).last(site.folder)
        print(f"FAULT_POINT={call}:{number}  {what or 'not reached'}")
        if what:
            reached += 1
            assert restarts(site) == before + 1
            fault_point(f"mover {call}:{number} {what}")
        check_at_rest(site.daemon)
        failures = {key: value for key, value in site.daemon.stats().counters.items() if "checksum_failures" in key}
        assert not sum(failures.values()), f"half a write is never taken for a whole one: {failures}"
        for name in "ab":
            site.check_served(name)
    assert reached >= len(numbers) // 2, "most of the chosen points must be reached"


def restarts(site: Site) -> float:
    return site.daemon.stats().counters["cached_mover_restarts_total"]


@pytest.mark.parametrize("call", CALLS)
def test_killed_with_the_daemon(site: Site, call: str, fault_point: Callable[[str], None]) -> None:
    begin(site)
    points = [(call, number) for number in points_of(site, call)]
    reached = try_points(site, points, fault_point, die=die, who="mover and daemon ")
    assert reached >= len(points) // 2, "most of the chosen points must be reached"


def die(site: Site, lives: Executor, call: str, number: int) -> tuple[str, Future[None], set[str]]:
    """As that of the daemon's calls; the call is one of the mover, which is stopped after it.

    The daemon is killed then. The life may go on.
    """
    log, mover = site.folder / "strace.log", mover_of(site)
    leaving: set[str] = set()

    def stopped() -> bool:
        return "stopped by SIGSTOP" in log.read_text(errors="replace")

    log.write_text("")
    with traced(mover, log, calls=[call], inject=f"{call}:signal=STOP:when={number}"):
        life = lives.submit(live, site, site.daemon.pid, leaving)
        wait_for(lambda: stopped() or life.done(), "the mover to be stopped or the life to end", LIFE_S)
        if stopped():
            site.daemon.kill()
            wait_for(lambda: not is_alive(mover), "the kernel to kill the mover with the daemon")
            return Calls(log).last(site.folder), life, leaving
    with suppress(ProcessLookupError):
        os.kill(mover, signal.SIGCONT)  # work in the background may have brought it there after all
    return "", life, leaving
