"""Readiness tells the truth: a state machine against a model, losses in the middle, and who hears of it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import cached_client
from cached_client.errors import NotReadyError, WarmUpError
from cached_client.testing import FakeDaemon
from cached_client.warmup import KeepWarm, Readiness, Status
from tests.unit.client_support import eventually, two_shards


@dataclass
class FakeModel:
    """Only what a readiness looks at."""

    name: str = "tiny"
    lease_lost: object | None = None
    damaged: tuple[object, ...] = field(default=())
    failed: bool = False
    suspended: bool = False


def loaded(readiness: Readiness) -> FakeModel:
    with readiness.loading() as loading:
        return loading.watch(FakeModel())


def warm(readiness: Readiness) -> FakeModel:
    model = loaded(readiness)
    readiness.warm_up(lambda *_: None)
    return model


def test_from_cold_to_warm_with_a_reason_at_each_step():
    told: list[Status] = []
    readiness = Readiness(on_change=told.append)
    assert (readiness.state, readiness.ready) == ("cold", False)
    with readiness.loading() as loading:
        loading.watch(FakeModel("a"))
        loading.watch(FakeModel("b"))
        assert readiness.state == "loading"
        with pytest.raises(NotReadyError, match="nothing to warm up: the weights are being loaded"):
            readiness.warm_up(lambda *_: None)
    assert readiness.status().reason == "the warm-up has not passed yet"
    seen = []
    result = readiness.warm_up(lambda *_: seen.append(readiness.state), batch_sizes=(1, 2))
    assert set(seen) == {"warming"}
    assert readiness.warm_up_result is result
    readiness.check()
    assert [(status.state, status.ready) for status in told] == [
        ("loading", False), ("warming", False), ("warm", True)
    ]  # fmt: skip
    assert told[-1].models == ("a", "b")
    assert told[-1].reason == ""


def test_a_callback_that_fails_does_not_stand_between_a_probe_and_its_answer(caplog):
    def fail(status):
        raise RuntimeError("a bug of the caller")

    readiness = Readiness(on_change=fail)
    model = warm(readiness)
    assert readiness.ready
    model.lease_lost = "gone"
    assert not readiness.ready
    assert "on_change of a readiness failed" in caplog.text


def test_a_load_that_fails_says_why():
    readiness = Readiness()
    with pytest.raises(ZeroDivisionError), readiness.loading():
        _ = 1 // 0
    assert readiness.state == "cold"
    assert readiness.status().reason.startswith("the load failed: ZeroDivisionError")
    with pytest.raises(NotReadyError, match="this worker is cold: the load failed"):
        readiness.check()


def test_a_warm_up_that_fails_leaves_it_warming_and_may_be_tried_again():
    readiness = Readiness()
    loaded(readiness)
    with pytest.raises(WarmUpError, match=r"b1.s1: ZeroDivisionError"):
        readiness.warm_up(lambda *_: 1 // 0)
    assert readiness.state == "warming"
    assert "b1.s1 (ZeroDivisionError" in readiness.status().reason
    readiness.warm_up(lambda *_: None)
    assert readiness.ready
    with pytest.raises(WarmUpError):
        readiness.warm_up(lambda *_: 1 // 0)
    assert not readiness.ready


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda model: setattr(model, "lease_lost", "it is gone"), "the lease of tiny is lost: it is gone"),
        (lambda model: setattr(model, "damaged", ("a range",)), "tiny is damaged in memory: a range"),
        (lambda model: setattr(model, "failed", True), "the load of tiny failed"),
    ],
)
def test_a_model_that_is_lost_makes_it_cold_until_it_is_loaded_and_warmed_again(loss, reason):
    told: list[Status] = []
    readiness = Readiness(on_change=told.append)
    model = warm(readiness)
    loss(model)
    assert (readiness.state, readiness.status().reason) == ("cold", reason)
    assert [status.state for status in told].count("cold") == 1
    with pytest.raises(NotReadyError, match="nothing to warm up"):
        readiness.warm_up(lambda *_: None)
    warm(readiness)
    assert readiness.ready


def test_a_loss_during_the_warm_up_ends_it_and_it_counts_for_nothing():
    readiness = Readiness()
    model = loaded(readiness)
    calls = []

    def call(batch_size, length):
        calls.append(1)
        model.lease_lost = "gone"

    with pytest.raises(NotReadyError, match="lost during the warm-up: the lease of tiny"):
        readiness.warm_up(call, batch_sizes=(1, 2, 3))
    assert len(calls) == 1
    assert readiness.state == "cold"


def test_the_warm_up_of_an_earlier_load_does_not_make_a_later_one_warm():
    readiness = Readiness()
    loaded(readiness)

    def call(batch_size, length):
        readiness.lost("somebody pulled the plug")
        loaded(readiness)

    with pytest.raises(NotReadyError):
        readiness.warm_up(call)
    assert readiness.state == "warming"


def test_a_load_that_was_overtaken_changes_nothing_when_it_ends():
    readiness = Readiness()
    with readiness.loading() as first:
        model = warm(readiness)
        stale = first.watch(FakeModel("stale"))
    assert readiness.ready
    stale.lease_lost = "who cares"
    assert readiness.ready
    model.lease_lost = "gone"
    assert not readiness.ready


class ReadinessMachine(RuleBasedStateMachine):
    """Against the rule in one sentence: ready iff the last load ended well, was warmed after, and nothing was lost."""

    def __init__(self):
        super().__init__()
        self.readiness = Readiness()
        self.model = FakeModel()
        self.expected = "cold"
        self.ready_statuses = 0

    @rule(fails=st.booleans(), lost_within=st.booleans())
    def load(self, fails, lost_within):
        self.model = FakeModel()
        try:
            with self.readiness.loading() as loading:
                loading.watch(self.model)
                assert self.readiness.state == "loading"
                if lost_within:
                    self.model.damaged = ("x",)
                if fails:
                    raise OSError("failed")
        except OSError:
            assert fails
        self.expected = "cold" if fails or lost_within else "warming"

    @rule(fails=st.booleans(), lost_within=st.booleans(), told=st.booleans())
    def warm_up(self, fails, lost_within, told):
        def call(batch_size, length):
            if lost_within and told:
                self.readiness.lost("told")
            elif lost_within:
                self.model.lease_lost = "x"
            if fails:
                raise OSError("failed")

        try:
            self.readiness.warm_up(call, iterations=2)
        except NotReadyError:
            assert self.expected in {"cold", "loading"} or lost_within
        except WarmUpError:
            assert fails
        else:
            assert self.expected in {"warming", "warm"}
            assert not fails
            assert not lost_within
        if self.expected in {"warming", "warm"}:
            self.expected = "cold" if lost_within else "warming" if fails else "warm"

    @rule(how=st.sampled_from(["lease", "damage", "told"]))
    def lose(self, how):
        if how == "told":
            self.readiness.lost("told")
        elif how == "lease":
            self.model.lease_lost = "x"
        else:
            self.model.damaged = ("x",)
        self.expected = "cold"

    @invariant()
    def it_is_what_it_should_be(self):
        status = self.readiness.status()
        assert status.state == self.expected
        assert status.ready is (self.expected == "warm")
        assert bool(status.reason) is not status.ready


TestReadinessMachine = ReadinessMachine.TestCase
TestReadinessMachine.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)


def test_a_real_model_whose_daemon_lost_it(tmp_path):
    readiness = Readiness()
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("tiny", two_shards()[0])
        with readiness.loading() as loading:
            model = loading.watch(cache.attach("tiny", wait=True))
        readiness.warm_up(lambda *_: model.state_dict())
        assert readiness.ready
        daemon.stop()
        assert readiness.ready  # a daemon that is restarted costs nothing
        daemon.remove("tiny")
        daemon.start()
        eventually(lambda: not readiness.ready, "the loss")
        assert "the lease of tiny is lost" in readiness.status().reason


def test_a_real_model_that_is_suspended_has_to_be_warmed_again_after(tmp_path):
    readiness = Readiness()
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("tiny", two_shards()[0])
        with readiness.loading() as loading:
            model = loading.watch(cache.attach("tiny", wait=True))
        readiness.warm_up(lambda *_: None)
        model.suspend()
        assert (readiness.state, readiness.status().reason) == ("cold", "tiny is suspended")
        with readiness.loading() as loading:
            model.resume()
            loading.watch(model)
        assert not readiness.ready
        readiness.warm_up(lambda *_: model.state_dict())
        assert readiness.ready


def test_a_real_model_of_which_bytes_were_found_damaged(tmp_path):
    readiness = Readiness()
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        files = two_shards()[0]
        daemon.add("tiny", files)
        with readiness.loading() as loading:
            loading.watch(cache.attach("tiny", wait=True))
        readiness.warm_up(lambda *_: None)
        daemon.damage("tiny", "model-00001-of-00002.safetensors", 0, 16)
        eventually(lambda: not readiness.ready, "the damage")
        assert "damaged" in readiness.status().reason


# Keep-warm.


def test_a_synthetic_request_comes_after_idle_time_and_again():
    with KeepWarm(lambda: None, idle_s=0.01) as keep_warm:
        eventually(lambda: keep_warm.requests >= 3, "three synthetic requests")
    made = keep_warm.requests
    assert not any(thread.name == "cached-keep-warm" for thread in threading.enumerate())
    assert keep_warm.requests == made


def test_none_comes_beside_real_requests():
    asked = threading.Event()
    with KeepWarm(asked.set, idle_s=0.01) as keep_warm:
        with keep_warm.busy():
            eventually(lambda: keep_warm._busy == 1, "busy")
            asked.clear()
            assert not asked.wait(0.1)  # ten times the idle time
            with keep_warm.busy():
                pass
            assert not asked.wait(0.05)
        assert asked.wait(20)


def test_closing_waits_for_the_one_that_runs_and_begins_no_other():
    running, go_on = threading.Event(), threading.Event()

    def call():
        running.set()
        assert go_on.wait(20)

    keep_warm = KeepWarm(call, idle_s=0.001)
    assert running.wait(20)
    closing = threading.Thread(target=keep_warm.close)
    closing.start()
    go_on.set()
    closing.join(20)
    assert not closing.is_alive()
    assert keep_warm.requests == 1
    keep_warm.close()


def test_only_a_ready_worker_is_kept_warm_and_one_that_fails_again_and_again_is_lost():
    readiness = Readiness()
    healthy = threading.Event()
    healthy.set()

    def call():
        if not healthy.is_set():
            raise RuntimeError("CUDA error")

    with KeepWarm(call, idle_s=0.005, readiness=readiness, failures=2) as keep_warm:
        assert keep_warm.requests == 0
        warm(readiness)
        eventually(lambda: keep_warm.requests > 2, "synthetic requests")
        assert readiness.ready
        healthy.clear()
        eventually(lambda: not readiness.ready, "the loss")
        assert readiness.status().reason == "2 synthetic requests failed, the last with RuntimeError('CUDA error')"
        made = keep_warm.requests
        assert not healthy.wait(0.05)
        assert keep_warm.requests == made  # a cold worker is left alone


@pytest.mark.parametrize(
    "wrong", [{"idle_s": 0}, {"idle_s": float("nan")}, {"idle_s": float("inf")}, {"idle_s": 1e10}, {"failures": 0}]
)
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(cached_client.InvalidRequestError, match="idle_s must be above 0"):
        KeepWarm(lambda: None, **wrong)
