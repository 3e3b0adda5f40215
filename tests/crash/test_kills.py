"""SIGKILL at seeded instants and at exact steps; afterwards everything holds and every served byte is right.

``CRASH_SEED=n`` repeats a run, ``CRASH_KILLS=n`` and ``CRASH_STEPS=n`` make it longer, ``CRASH_STEP=n`` repeats a step.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest

import cached_client
from cached.units import CHUNK_BYTES
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, safetensors, sha256
from tests.invariants import check_at_rest

KILLS = int(os.environ.get("CRASH_KILLS", "5"))
STEPS = int(os.environ.get("CRASH_STEPS", "5"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
NEVER = 0
SHARED = safetensors(CHUNK_BYTES + MB, 99)


def publish(site: Site) -> None:
    """Three models, two of which share a shard, and room in L1 and L2 for two of them."""
    for seed, name in enumerate("abc", 1):
        files = model_files(CHUNK_BYTES + seed * MB, seed=seed)
        if name != "c":
            files["shared.safetensors"] = SHARED
        known = {path: sha256(data) for path, data in files.items()} if name == "a" else {}
        site.add(name, files, sha256=known)
    site.settings |= {
        "l1": {"capacity": "60MB", "pool_bytes": "30MB"},
        "l2": {"capacity": "60MB"},
        "transfer": {"idle_timeout_s": 60.0},
    }


def ask(site: Site, action: Callable[[], object]) -> None:
    """The daemon may refuse, and it may die under it."""
    with contextlib.suppress(cached_client.CacheError):
        action()


def live(site: Site, chance: random.Random) -> None:
    """One random request."""
    name = chance.choice("abc")
    match chance.randrange(9):
        case 0 | 1 | 2:
            ask(site, lambda: site.pull(name))
        case 3:
            ask(site, lambda: site.pull(name, level="l2"))
        case 4:
            ask(site, lambda: site.evict(name, chance.choice(["l1", "l2", "all"])))
        case 5:
            ask(site, lambda: site.verify(name, repair=True))
        case 6:
            ask(site, lambda: site.begin(name))
        case 7:
            ask(site, lambda: attach_part(site, name, chance.choice(["t0.weight", "t2.weight"])))
        case _:
            ask(site, lambda: set_tier(site, name, chance.choice([pb.TIER_COLD, pb.TIER_WARM])))


def live_until(site: Site, chance: random.Random, ended: threading.Event) -> None:
    while not ended.is_set():
        live(site, chance)


def attach_part(site: Site, name: str, pattern: str) -> None:
    with site.cache() as cache, cache.attach(name, only=[pattern], timeout_s=60, wait=True):
        pass


def set_tier(site: Site, name: str, tier: pb.Tier) -> None:
    with site.rpc() as stub:
        stub.SetTier(pb.SetTierRequest(ref=name, tier=tier))


def check_after_crash(site: Site, *, content: bool = False) -> None:
    """Ready again, at rest by itself, nothing left over, and each model is served as its source is."""
    check_at_rest(site.daemon, content=content, kept_ingests=True)  # parts of models, perhaps
    for name in "abc":
        site.check_served(name)
    check_at_rest(site.daemon, content=False)
    assert not sum(
        value for key, value in site.daemon.stats().counters.items() if key.startswith("cached_checksum_failures_total")
    ), "a crash damages nothing"


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * KILLS)
def test_kills_at_random_instants(site: Site, fault_cases: Callable[[int], None]) -> None:
    chance = random.Random(SEED)
    publish(site)
    site.start()
    for kill in range(KILLS):
        print(f"seed {SEED}, kill {kill}")
        ended = threading.Event()

        chances = [random.Random(chance.random()) for _ in range(2)]
        workers = [threading.Thread(target=live_until, args=(site, own, ended)) for own in chances]
        for worker in workers:
            worker.start()
        # Instants early in an operation are as likely as late ones, whatever the machine's speed.
        threading.Event().wait(chance.choice([0.02, 0.1, 0.4]) * (0.5 + chance.random()))
        site.daemon.kill()
        ended.set()
        for worker in workers:
            worker.join()
        site.start()
        check_after_crash(site)
        fault_cases(kill + 1)
    check_at_rest(site.daemon)


@pytest.mark.slow
@pytest.mark.timeout(120 + 30 * STEPS)
def test_kills_at_exact_steps(site: Site, fault_point: Callable[[str], None]) -> None:
    """Before or after a rename, fsync, unlink, write, index write, ...: evenly over a whole life."""
    publish(site)
    total = len(life(site, NEVER))
    assert total > 50, "the steps are no longer seen"
    # Later lives have fewer steps: folders and the index are there already.
    numbers = [int(os.environ["CRASH_STEP"])] if "CRASH_STEP" in os.environ else _spread(total * 3 // 4)
    reached = 0
    for number in numbers:
        steps = life(site, number)
        when = f"{'after' if number % 2 == 0 else 'before'} step {number}: {steps[-1].partition(' ')[2]}"
        print(f"CRASH_STEP={number}  {when}")
        if len(steps) == number:
            reached += 1
            fault_point(when)
    assert reached >= len(numbers) // 2, "most of the chosen steps must be reached"
    site.started_by()
    site.start()


def _spread(total: int) -> list[int]:
    """Numbers of STEPS steps of ``total``, before some and after others."""
    return [max(1, round((number + 0.5) * total / STEPS)) for number in range(STEPS)]


def life(site: Site, number: int) -> list[str]:
    """From empty levels to a death at a step, and the check of what is left; the steps until then."""
    trace = site.folder / "steps"
    site.started_by(sys.executable, "-m", "tests.crash.kill_at_step", str(number), str(trace))
    live_once(site)
    site.started_by()
    site.start()
    check_after_crash(site)
    clear(site)
    return trace.read_text().splitlines()


def live_once(site: Site) -> None:
    """From the start to a drain, or to wherever it dies."""
    site.daemon.start(wait=False)
    wait_for(lambda: site.daemon.log_events("daemon.ready") or not site.daemon.is_running, "ready or dead")
    for act in _LIFE:
        if site.daemon.is_running:
            ask(site, partial(act, site))
    if site.daemon.is_running:
        site.daemon.signal(signal.SIGTERM)
    site.daemon.wait()


def clear(site: Site) -> None:
    """Everything is evicted, and the daemon ended: the next life begins with empty levels."""
    check_at_rest(site.daemon, content=False)
    for name in "abc":
        ask(site, partial(site.evict, name, "all"))
    site.daemon.kill()


_LIFE: tuple[Callable[[Site], object], ...] = (
    lambda site: site.pull("a"),
    lambda site: site.pull("b"),
    lambda site: site.evict("a", "l1"),
    lambda site: site.pull("a"),
    lambda site: site.evict("b", "all"),
    lambda site: attach_part(site, "b", "t0.weight"),
    lambda site: site.pull("c", level="l2"),
    lambda site: site.pull("c"),
)
