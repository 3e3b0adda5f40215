"""The one place where failures are counted and told, and what never grows by what clients do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import structlog
from google.rpc import error_details_pb2

from cached import logs
from cached.cache.background import Background, cancel, repeat, run_each
from cached.cache.events import EventBus
from cached.cache.failures import Failures
from cached.cache.seeds import Seeds
from cached.errors import (
    CachedError,
    InvalidRequestError,
    LevelError,
    NoRoomError,
    OriginUnavailableError,
    TimeoutExpiredError,
    all_errors,
)
from cached.failures import KINDS, FailureKind
from cached.metrics import Metrics
from cached.rpc.errors import to_status
from cached.tracing import carrying
from cached_client.errors import TimeoutExpiredError as ClientTimeoutError
from cached_client.errors import error_of_reason


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return 1e9 + self.now_s

    async def sleep(self, delay_s: float) -> None:
        self.now_s += delay_s
        await asyncio.sleep(0)


class Told:
    """Failures with their metrics, events and log lines."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.metrics = Metrics()
        self.bus = EventBus(self.clock)
        self.failures = Failures(self.bus, self.metrics, self.clock)
        self.lines: list[dict[str, object]] = []

    def counted(self, reason: str) -> float:
        return self.metrics.counters()[f'cached_failures_total{{reason="{reason}"}}']

    def kinds(self) -> list[str]:
        return [event.kind for event in self.bus.recent]


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()

    def keep(_logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        made.lines.append({**event, "level": method})
        raise structlog.DropEvent

    before = structlog.get_config()
    structlog.configure(processors=[logs.of_trace, keep])
    yield made
    structlog.configure(**before)


def caused() -> CachedError:
    try:
        try:
            try:
                raise TimeoutError("timed out")
            except TimeoutError as error:
                raise OriginUnavailableError("s3://b did not answer", uri="s3://b") from error
        except CachedError as error:
            raise LevelError("m could not be brought", level="l2") from error
    except CachedError as error:
        return error


def test_the_chain_of_causes_is_one_line_also_from_another_process() -> None:
    error = caused()
    assert error.chain == "m could not be brought: because s3://b did not answer: because TimeoutError: timed out"
    arrived = CachedError.from_dict(json.loads(json.dumps(error.to_dict())))
    assert arrived.chain == error.chain
    wrapped = NoRoomError("no\nroom")
    wrapped.__cause__ = arrived
    assert wrapped.chain == f"no room: because {error.chain}"


def test_a_cause_that_the_message_tells_already_is_not_repeated_and_many_are_cut() -> None:
    error = LevelError("write failed: No space left on device")
    error.__cause__ = OSError("No space left on device")
    assert error.chain == error.message
    link: BaseException = error
    for number in range(100):
        link.__cause__ = ValueError(f"{number}-{'x' * 5000}")
        link = link.__cause__
    assert len(error.causes) == 8
    assert len(error.chain) < 10_000


def test_what_happened_beside_is_no_cause() -> None:
    """It may hold secrets: who knows that it does not says ``from``."""
    with pytest.raises(LevelError) as caught:
        try:
            raise ValueError("hunter2")
        except ValueError:
            raise LevelError("cannot") from None
    assert caught.value.chain == "cannot"


def test_a_failure_that_many_meet_is_counted_and_told_once_and_logged_for_each(told: Told) -> None:
    error = caused()
    told.failures.report("load.failed", error, f"m: {error.message}", name="m", load="1")
    for number in range(3):
        with carrying(f"{number:032x}"):
            told.failures.refused("rpc.refused", error, method="Attach")
    assert told.counted("LEVEL_FAILED") == 1
    assert told.kinds() == ["load.failed"]
    (event,) = told.bus.recent
    assert (event.name, event.fields["level"], event.fields["load"]) == ("m", "l2", "1")
    assert event.fields["chain"] == error.chain
    refused = [line for line in told.lines if line["event"] == "rpc.refused"]
    assert [line["trace_id"] for line in refused] == [f"{number:032x}" for number in range(3)]
    assert {line["level"] for line in refused} == {"warning"}, "it is not the caller's affair"


def test_what_clients_do_wrong_is_counted_and_logged_always_but_does_not_fill_the_memory_of_events(told: Told) -> None:
    for _ in range(1000):
        told.failures.refused("rpc.refused", InvalidRequestError("x" * 10**6, value="y" * 10**6), method="Describe")
    assert told.counted("INVALID_REQUEST") == len(told.lines) == 1000
    assert {line["level"] for line in told.lines} == {"info"}
    assert 0 < len(told.bus.recent) <= 20
    assert told.bus.decisions == ()
    assert all(len(event.message) < 1100 and len(event.fields["value"]) < 1100 for event in told.bus.recent)
    told.clock.now_s += 60
    before = len(told.bus.recent)
    told.failures.refused("rpc.refused", InvalidRequestError("again"))
    assert len(told.bus.recent) == before + 1


def test_an_unforeseen_exception_is_told_once_and_nothing_of_it_leaves_the_daemon(told: Told) -> None:
    with carrying("a" * 32):
        error = told.failures.bug("rpc", KeyError("secret"), method="List")
    (line,) = [line for line in told.lines if line["event"] == "internal.traceback"]
    assert isinstance(line["exc_info"], KeyError)
    assert line["trace_id"] == "a" * 32
    assert "secret" not in f"{error.message} {error.hint} {error.fields}"
    assert error.fields["trace_id"] == "a" * 32
    assert told.counted("INTERNAL") == 1
    (event,) = told.bus.recent
    assert (event.kind, event.fields["where"]) == ("internal.error", "rpc")
    assert event.fields["chain"] == "an internal error: because KeyError: 'secret'"


def test_a_part_that_is_degraded_is_told_when_that_begins_and_ends(told: Told) -> None:
    degraded = told.failures.degraded
    for why in ("full", "full", "gone"):
        degraded.began("l2", why)
    assert dict(degraded) == {"l2": "gone"}
    degraded.ended("l2")
    degraded.ended("l2")
    assert told.kinds() == ["degraded.began", "degraded.ended"]
    assert told.counted("LEVEL_FAILED") == 1
    error = NoRoomError("no")
    told.failures.report("l2.skipped", error)
    degraded.began("l2", "no", error)
    assert told.counted("NO_ROOM") == 1, "what was reported is not counted again"
    assert told.bus.recent[-1].fields["reason"] == "NO_ROOM"


async def turns(told: Told, step: Callable[[], Awaitable[None]], *, count: int) -> None:
    task = asyncio.create_task(repeat(told.clock, 1.0, step, what="upkeep", failures=told.failures))
    began_s = told.clock.now_s
    while told.clock.now_s < began_s + count:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("failure", [LevelError("full"), KeyError("bug")])
async def test_work_that_fails_again_and_again_goes_on_and_is_one_event(told: Told, failure: Exception) -> None:
    async def step() -> None:
        raise failure

    await turns(told, step, count=50)
    kind, reason = ("background.failed", "LEVEL_FAILED") if isinstance(failure, CachedError) else (
        "internal.error", "INTERNAL"
    )  # fmt: skip
    assert told.kinds() == [kind]
    assert told.counted(reason) >= 49
    assert sum(line["event"] == "internal.traceback" for line in told.lines) == (kind == "internal.error")


async def test_a_task_that_ends_by_an_exception_is_told_at_once_and_degrades_the_daemon(told: Told) -> None:
    async def work() -> None:
        raise KeyError("bug")

    background = Background(told.failures)
    background.start("resume", work())
    while not told.failures.degraded:
        await asyncio.sleep(0)
    assert "resume does not run any more" in told.failures.degraded["other"]
    assert told.kinds() == ["internal.error", "degraded.began"]
    await background.stop()


async def test_a_step_of_the_end_that_fails_keeps_no_other_from_being_taken(told: Told) -> None:
    taken: list[str] = []

    async def fails() -> None:
        raise LevelError("full")

    async def other() -> None:
        taken.append("other")

    await run_each(told.failures, {"first": fails, "second": other})
    assert taken == ["other"]
    assert told.counted("LEVEL_FAILED") == 1


async def test_what_a_task_ended_by_before_it_was_cancelled_is_told(told: Told) -> None:
    async def ends(error: Exception | None) -> None:
        if error is not None:
            raise error
        await asyncio.sleep(3600)

    tasks = [asyncio.ensure_future(ends(error)) for error in (KeyError("bug"), LevelError("full"), None)]
    await asyncio.sleep(0)
    await cancel(told.failures, "load", *tasks)
    assert told.kinds() == ["internal.error"], "an error of ours is told by whoever met it"


async def test_a_folder_of_seeds_that_cannot_be_read_is_told_once(told: Told, tmp_path: Path) -> None:
    loop = tmp_path / "seeds"
    loop.symlink_to(loop)
    seeds = Seeds([str(loop), str(tmp_path / "not-mounted-yet")], told.bus)
    for _ in range(2):
        assert await seeds.of("m") is None
    (event,) = told.bus.recent
    assert event.kind == "seed.refused"
    assert "symbolic links" in event.message


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.reason)
def test_every_kind_reaches_the_client_with_what_to_do(kind: FailureKind) -> None:
    with carrying("b" * 32):
        status = to_status(all_errors()[kind.reason]("it failed", path="/x"))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("cached.v1", kind.reason)
    assert info.metadata["hint"] == kind.hint
    assert (info.metadata["trace_id"], info.metadata["path"]) == ("b" * 32, "/x")


def test_a_limit_of_the_daemons_own_is_a_timeout_on_the_client() -> None:
    error = TimeoutExpiredError("nothing came for 60 s", what="the next piece", timeout_s=60)
    arrived = error_of_reason(error.reason, error.message, fields=error.fields)
    assert isinstance(arrived, ClientTimeoutError)
    assert arrived.fields == {"what": "the next piece", "timeout_s": "60"}
