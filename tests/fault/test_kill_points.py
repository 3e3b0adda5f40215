"""SIGKILL at exact system calls: of pull, promotion, eviction, verification, index write; and of the recovery after.

``strace`` kills the daemon as it enters the Nth call of a kind, N = 1, 2, …: the call is not made. After each death the
bytes on both levels are looked at as they lie, and then by the next daemon, which must adopt what memory has, serve
every byte right, and leave nothing behind.

``FAULT_POINTS=n`` sets how many points of each call are tried; ``FAULT_POINT=rename:7`` repeats one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial

import grpc
import psutil
import pytest

from cached.units import CHUNK_BYTES
from cached_client import CacheError, DaemonUnavailableError
from cached_client.errors import InUseError
from tests.crash.test_kills import ask, attach_part
from tests.fault.strace import Calls, is_alive, require_strace, traced, wait_until_written
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files
from tests.invariants import check_at_rest, wrong_blobs

CALLS = (
    "chmod", "fallocate", "fchmod", "fcntl", "fdatasync", "fsync", "ftruncate", "linkat", "mkdir", "openat", "pwrite64",
    "rename", "renameat2", "rmdir", "sendmsg", "symlink", "unlink", "write",
)  # fmt: skip
"""All that the daemon itself makes to change what outlives it, to answer, and to hand out."""
POINTS = int(os.environ.get("FAULT_POINTS", "14"))
SOME = int(os.environ.get("FAULT_POINTS", "6"))
ONLY = os.environ.get("FAULT_POINT", "")
CALLS_OF_STARTS = ("fchmod", "fcntl", "fsync", "ftruncate", "mkdir", "pwrite64", "rename", "symlink", "unlink", "write")


def publish(site: Site) -> None:
    """Two models of which one has two chunks, and one that starts the movers."""
    site.add("a", model_files(3 * MB, seed=1))
    site.add("b", model_files(CHUNK_BYTES + MB, seed=2))
    site.add("c", model_files(MB, seed=3))
    site.settings |= {
        "l1": {"capacity": "60MB", "pool_bytes": "20MB"},
        "l2": {"capacity": "60MB"},
        "transfer": {"idle_timeout_s": 60.0},
    }


Death = Callable[[Site, Executor, str, int], tuple[str, Future[None], set[str]]]
LIFE_S = 180.0
"""How long a whole life may take under ``strace`` on a busy machine."""
LIFE: tuple[tuple[str, Callable[[Site], object]], ...] = (
    ("", lambda site: site.pull("a")),
    ("", lambda site: site.pull("b")),
    ("a", lambda site: site.evict("a", "l1")),
    ("", lambda site: site.check_served("a")),
    ("", lambda site: site.verify("b", repair=True)),
    ("b", lambda site: site.evict("b", "all")),
    ("", lambda site: attach_part(site, "b", "t0.weight")),
    ("", lambda site: site.pull("b", level="l2")),
    ("", lambda site: site.check_served("b")),
)
"""Whom an act evicts, and the act."""


def live(site: Site, pid: int, leaving: set[str]) -> None:
    """Until the daemon dies; whose eviction was under way just then is left in ``leaving``."""
    for evicted, act in LIFE:
        if not is_alive(pid):
            return
        if evicted:
            leaving.add(evicted)
        try:
            act(site)
        except DaemonUnavailableError:
            return  # it is dying
        except CacheError:
            pass
        leaving.discard(evicted)


def clear(site: Site) -> None:
    """Both levels are empty, and a mover runs."""
    for name in "ab":
        ask(site, partial(site.evict, name, "all"))
    wait_for(lambda: evicted(site, "c"), "c to be free")
    site.pull("c")


def evicted(site: Site, name: str) -> bool:
    """Not while a daemon that has just started confirms what it found of it."""
    try:
        site.evict(name, "all")
    except InUseError:
        return False
    return True


def check_levels(site: Site) -> None:
    """What is called a blob has the bytes of its name already before anybody looks at it."""
    wrong = wrong_blobs(site.daemon)
    assert not wrong, f"wrong bytes under their names: {wrong}"


def announced(site: Site) -> dict[str, int]:
    """Segments of whole files by the digests that they are named by, and which memory each is."""
    return {path.name.split(".")[3]: path.stat().st_ino for path in site.segments("blob")}


def check_next(site: Site, life: Future[None] | None = None, leaving: Collection[str] = ()) -> float:
    """The next daemon: adopts what memory has without reading for it, serves what is true, leaves nothing over.

    A worker of the ``life`` before that was attaching goes on by itself with this one, and then ends. Models that were
    whole in memory or on disk are there still, in the very same memory, as far as they were; of one that was just
    arriving, its files are. Of models that were being evicted as it died (``leaving``) what still had its name may be
    evicted to the end instead. In how many seconds it was ready.
    """
    before = announced(site)
    on_disk = {path.name for path in site.daemon.l2_dir.glob("blobs/*/*")}
    began_s = time.monotonic()
    site.start()
    ready_s = time.monotonic() - began_s
    if life:
        life.result(LIFE_S)
    check_at_rest(site.daemon, content=True, kept_ingests=True)
    after = announced(site)
    shown = {file.sha256 for name in "abc" for file in site.describe(name).files if file.in_l1}
    assert shown <= set(after)
    for name in set("abc") - set(leaving):
        digests = {file.sha256 for file in site.describe(name).files}
        lost = digests & set(before) - set(after)
        if digests <= set(before) or digests <= on_disk:
            lost |= {digest for digest in digests & set(before) if after.get(digest) != before[digest]}
        assert not lost, f"memory of {name} was not adopted as it was: {lost}"
    for name in "abc":
        site.check_served(name)
    check_at_rest(site.daemon, content=False)
    failures = {key: value for key, value in site.daemon.stats().counters.items() if "checksum_failures" in key}
    assert not sum(failures.values()), f"a crash damages nothing: {failures}"
    return ready_s


def die(site: Site, lives: Executor, call: str, number: int) -> tuple[str, Future[None], set[str]]:
    """A life until the call of this number; what it was, empty if there were not so many; and who was leaving.

    The life may go on.
    """
    log = site.folder / "strace.log"
    pid = site.daemon.pid
    leaving: set[str] = set()
    with traced(pid, log, calls=[call], inject=f"{call}:signal=KILL:when={number}") as tracer:
        life = lives.submit(live, site, pid, leaving)
        wait_for(lambda: life.done() or not is_alive(pid), "the life or the daemon to end", LIFE_S)
        if Calls(log).reached()[call] >= number:
            wait_for(lambda: not is_alive(pid), "the daemon to die")
        if not is_alive(pid):
            wait_until_written(tracer)
    # Work in the background may have brought it to that call after the life, and until strace let go of it.
    if answers(site):
        return "", life, leaving
    site.daemon.wait()
    return Calls(log).last(site.folder) or f"{call}(", life, leaving


def answers(site: Site) -> bool:
    """Whether the daemon lives: one that was killed answers no call, even before it is gone."""
    try:
        site.daemon.stats()
    except (grpc.RpcError, AssertionError):
        return False
    return True


def spread(most: int, count: int) -> list[int]:
    """Up to ``count`` numbers of 1 … ``most``, evenly."""
    return sorted({1 + round(index * (most - 1) / max(1, min(count, most) - 1)) for index in range(min(count, most))})


def numbers_of_calls(site: Site, calls: tuple[str, ...]) -> dict[str, int]:
    log = site.folder / "all.log"
    pid = site.daemon.pid
    with traced(pid, log, calls=calls):
        live(site, pid, set())
    return dict(Calls(log).reached())


def try_points(
    site: Site,
    points: list[tuple[str, int]],
    fault_point: Callable[[str], None],
    *,
    die: Death = die,
    who: str = "",
    ready_s: list[float] | None = None,
) -> int:
    """Dies at each point, and checks; how many were reached. ``who`` makes the calls. ``ready_s``: of the next ones."""
    reached = 0
    with ThreadPoolExecutor(1) as lives:
        for call, number in points:
            clear(site)
            what, life, leaving = die(site, lives, call, number)
            print(f"FAULT_POINT={call}:{number}  {what or 'not reached'}")
            if what:
                reached += 1
                check_levels(site)
                took_s = check_next(site, life, leaving)
                if ready_s is not None:
                    ready_s.append(took_s)
                fault_point(f"{who}{call}:{number} {what}")
    return reached


def begin(site: Site) -> None:
    require_strace()
    publish(site)
    site.start()
    clear(site)
    live(site, site.daemon.pid, set())
    clear(site)


@pytest.mark.faults
@pytest.mark.timeout(240 + 60 * POINTS)
@pytest.mark.parametrize("call", CALLS)
def test_killed_at_any_call(site: Site, call: str, fault_point: Callable[[str], None]) -> None:
    begin(site)
    most = numbers_of_calls(site, (call,)).get(call, 0)
    assert most, f"the daemon makes no {call} any more"
    points = [(call, number) for number in spread(most, POINTS)]
    assert try_points(site, points, fault_point) >= len(points) // 2, "most of the chosen points must be reached"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_some_calls(
    site: Site, fault_point: Callable[[str], None], fault_figure: Callable[[str], None]
) -> None:
    """The representative part: a point near the middle of some calls, others in each place."""
    begin(site)
    most = numbers_of_calls(site, CALLS)
    wanted = ["renameat2", "fsync", "pwrite64", "unlink", "sendmsg", "fcntl", "rename", "ftruncate", "openat"][:SOME]
    points = [
        (call, max(1, most[call] * place // (len(wanted) + 2))) for place, call in enumerate(wanted, 1) if call in most
    ]
    if ONLY:
        points = [(ONLY.partition(":")[0], int(ONLY.partition(":")[2]))]
    ready_s: list[float] = []
    assert try_points(site, points, fault_point, ready_s=ready_s) >= 1
    fault_figure(f"after {len(ready_s)} kills the next daemon was ready in {max(ready_s):.1f} s at most")


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("call", CALLS_OF_STARTS)
def test_killed_while_it_recovers(site: Site, call: str, fault_point: Callable[[str], None]) -> None:
    """The first death leaves work for the next start, which dies of its own."""
    begin(site)
    reached = 0
    for number in spread(12, max(2, POINTS // 3)):
        clear(site)
        site.begin("b")
        site.pull("a")
        site.daemon.kill()
        what = killed_at_start(site, call, number)
        print(f"start, {call}:{number}  {what or 'not reached'}")
        if not what:
            continue
        reached += 1
        check_levels(site)
        site.started_by()
        check_next(site)
        fault_point(f"start {call}:{number} {what}")
    assert reached or call in {"fchmod", "fsync", "symlink"}, "a start makes such calls"


def killed_at_start(site: Site, call: str, number: int) -> str:
    """The call of this number that a start died of; if there were not so many, "", and a daemon of the usual kind."""
    log = site.folder / "start.log"
    inject = f"inject={call}:signal=KILL:when={number}"
    site.started_by("strace", "-f", "-qq", "-o", str(log), "-e", f"trace={call}", "-e", inject)
    site.daemon.start(wait=False)
    wait_for(lambda: site.daemon.log_events("daemon.ready") or not site.daemon.is_running, "ready or dead", LIFE_S)
    if not site.daemon.is_running:
        return Calls(log).last(site.folder)
    for daemon in psutil.Process(site.daemon.pid).children():
        daemon.kill()  # strace ends after it
    died = site.daemon.wait()
    assert died, "strace ends as what it has started"
    site.started_by()
    site.start()
    return ""
