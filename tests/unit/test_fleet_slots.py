"""Slots of the fleet against an API over HTTP, with time that the tests make pass."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cached.fleet import slots as slots_module
from cached.fleet.kube import KubeApi, KubeError, LeaseState
from cached.fleet.slots import AWAY_S, LEASE_S, Slots, Watched, lease_name
from tests.kube_api import KubeServer


class QuickClock:
    """Whoever sleeps makes the time pass: at once for this process, in full by this clock."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return self.now_s

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(0.001)
        self.now_s += delay_s


class ScaledClock(QuickClock):
    """All who share it see the same time, twenty times faster than it is: a holder may stall for a second or two."""

    def monotonic_s(self) -> float:
        return 20 * time.monotonic()

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s / 20)


class Bench:
    def __init__(self, kube: KubeServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kube = kube
        self.clock = QuickClock()
        self.outcomes: list[str] = []
        self.away: list[str] = []
        monkeypatch.setenv("KUBECONFIG", str(kube.write_config(folder / "config")))
        # The library reads the variable when it is imported.
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(folder / "config"))
        self.api = KubeApi("node-1", "")

    def slots(self, count: int = 1, identity: str = "me", clock: QuickClock | None = None) -> Slots:
        return Slots(
            self.api, clock or self.clock, count=count, identity=identity, on_outcome=self.outcomes.append,
            on_away=self.away.append, rng=random.Random(1),
        )  # fmt: skip


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    with KubeServer() as kube:
        yield Bench(kube, tmp_path, monkeypatch)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


async def test_a_free_slot_is_taken_renewed_and_given_back(bench: Bench) -> None:
    async with bench.slots().held() as slot:
        assert slot == lease_name(0)
        assert bench.kube.holder(slot) == "me"
        await until(lambda: sum(method == "PUT" for method, _ in bench.kube.requests) >= 3)
        assert bench.kube.holder(slot) == "me"
    assert bench.kube.holder(slot) == ""
    assert bench.outcomes == ["acquired"]


async def test_never_more_hold_one_than_there_are_slots(bench: Bench) -> None:
    held, most, clock = 0, 0, ScaledClock()
    two_hold = asyncio.Barrier(2)

    async def pull(number: int) -> None:
        nonlocal held, most
        async with bench.slots(2, f"host-{number}", clock).held() as slot:
            assert slot
            held += 1
            most = max(most, held)
            await two_hold.wait()
            held -= 1

    async with asyncio.timeout(60):
        await asyncio.gather(*(pull(number) for number in range(8)))
    assert most == 2
    assert bench.outcomes.count("acquired") == 8


async def test_a_dead_holders_slot_is_taken_over_only_after_its_duration_by_our_own_clock(bench: Bench) -> None:
    bench.kube.hold(lease_name(0), "dead")  # its renewTime is long past, and says nothing
    began_s = bench.clock.now_s
    async with bench.slots().held():
        assert bench.clock.now_s - began_s > LEASE_S
        assert bench.kube.leases["default", lease_name(0)]["spec"]["leaseTransitions"] == 1
    assert bench.outcomes == ["taken_over"]


def test_a_record_that_changes_is_alive_whatever_its_times_say() -> None:
    watched = Watched()
    for turn in range(10):
        state = LeaseState("other", 60, "1970-01-01T00:00:00.000000Z", version=str(turn))
        assert not watched.is_free("a", state, now_s=50.0 * turn)
    assert not watched.is_free("a", state, now_s=450.0 + 60.0)
    assert watched.is_free("a", state, now_s=450.0 + 60.1)
    assert watched.is_free("a", LeaseState(version="99"), now_s=0.0)
    assert watched.is_free("b", None, now_s=0.0)


async def test_the_slot_of_this_very_daemon_before_its_restart_is_taken_at_once(bench: Bench) -> None:
    bench.kube.hold(lease_name(0), "me")
    began_s = bench.clock.now_s
    async with bench.slots().held() as slot:
        assert slot
        assert bench.clock.now_s == began_s
    assert bench.outcomes == ["acquired"]


@pytest.mark.parametrize("status", [401, 403, 429, 500])
async def test_an_api_that_refuses_is_gone_without_after_a_bounded_wait(bench: Bench, status: int) -> None:
    began_s = bench.clock.now_s
    with bench.kube.refusing(status, retry_after_s=2 if status == 429 else 0):
        async with bench.slots(4).held() as slot:
            assert slot == ""
            assert str(status) in bench.away[-1]
    assert AWAY_S <= bench.clock.now_s - began_s < 3 * AWAY_S
    assert bench.outcomes == ["skipped"]
    assert bench.away[-1] == "", "once it is over nothing is degraded"


async def test_an_api_that_comes_back_is_asked_again(bench: Bench) -> None:
    with bench.kube.refusing(503, times=2):
        async with bench.slots().held() as slot:
            assert slot
    assert bench.away[-1] == ""


async def test_who_lost_the_race_for_a_slot_goes_on_waiting(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write = bench.api.write_lease
    races: list[str] = []

    def late(name: str, state: LeaseState) -> LeaseState:
        if not races:
            races.append(name)
            bench.kube.hold(name, "quicker", duration_s=1)
        return write(name, state)

    monkeypatch.setattr(bench.api, "write_lease", late)
    async with bench.slots().held():
        pass
    assert races
    assert bench.outcomes == ["taken_over"]


async def test_a_slot_that_was_taken_away_is_told_and_not_given_back(bench: Bench) -> None:
    async with bench.slots().held() as slot:
        bench.kube.hold(slot, "other")
        await until(lambda: "lost" in bench.outcomes)
    assert bench.kube.holder(slot) == "other"


async def test_cancelling_while_waiting_or_holding_leaves_no_slot_taken(bench: Bench) -> None:
    bench.kube.hold(lease_name(0), "other", duration_s=10**6)
    waiting = asyncio.create_task(bench.slots().held().__aenter__())
    await until(lambda: len(bench.kube.requests) > 3)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bench.kube.holder(lease_name(0)) == "other"


def test_a_wrong_token_is_told_with_the_answer_of_the_api(bench: Bench, tmp_path: Path) -> None:
    bench.kube.write_config(tmp_path / "config", token="wrong")
    with pytest.raises(KubeError, match="401 Unauthorized"):
        bench.api.lease("x")


def test_polls_of_a_thousand_hosts_are_bounded() -> None:
    rng = random.Random(3)
    later_s = [slots_module.poll_delay_s(99, rng) for _ in range(1000)]
    assert sum(1 / delay_s for delay_s in later_s) < 130  # requests a second, all of them together


@pytest.mark.parametrize("text", ["", "{", "clusters: 7", '{"current-context": "x", "contexts": []}'])
def test_a_kubeconfig_that_cannot_be_used_is_told(bench: Bench, tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    with pytest.raises(KubeError, match="nothing says where the Kubernetes API is"):
        bench.api.node_labels()


def test_an_api_that_nobody_serves_is_told_and_asked_anew_when_it_is_back(bench: Bench, tmp_path: Path) -> None:
    bench.kube.add_node("node-1", zone="a")
    bench.kube.write_config(tmp_path / "config", url="http://127.0.0.1:9")
    with pytest.raises(KubeError, match="could not be reached"):
        bench.api.node_labels()
    bench.kube.write_config(tmp_path / "config")
    assert bench.api.node_labels()["zone"] == "a"
