"""Reports of starts in the daemon: hostile ones are refused, the others kept within bounds, counted, and shown."""

from __future__ import annotations

import asyncio
import json
import math
import random
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.cache import cold_starts
from cached.cache.cold_starts import ColdStarts, phase_seconds
from cached.cache.events import EventBus
from cached.cache.registry import Registry
from cached.clock import SystemClock
from cached.errors import CachedError, InvalidRequestError, NotFoundError
from cached.index import Index
from cached.metrics import Metrics
from cached.rpc.coldstart import cold_start_message, cold_start_of
from cached.types import COLD_START_PHASES, ColdStart, ColdStartPhase
from cached_client._proto import cached_pb2 as pb
from tests.unit.cli_support import Command, serving
from tests.unit.rpc_support import COLD_START, served

REPORTED = replace(COLD_START, reported_time_s=0.0)


@pytest.fixture
def cached(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with serving(tmp_path) as (engine, socket):
        yield Command(engine, socket, capsys)


async def test_a_report_passes_whole_in_both_directions(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        await it.stub.ReportColdStart(pb.ReportColdStartRequest(cold_start=cold_start_message(COLD_START)))
        it.engine.started = [COLD_START]
        answer = await it.stub.ListColdStarts(pb.ListColdStartsRequest(ref="tiny", limit=7))
        assert cold_start_of(answer.cold_starts[0]) == REPORTED
        assert answer.cold_starts[0].reported_time_s == 1010.0
        assert it.engine.calls == [("report_cold_start", REPORTED), ("cold_starts", "tiny", 7)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": ""}, "is not a model name"),
        ({"name": "../../etc"}, "is not a model name"),
        ({"name": "x" * 200}, "is not a model name"),
        ({"revision": "zz"}, "is not a revision"),
        ({"total_s": math.nan}, "total_s is nan"),
        ({"total_s": math.inf}, "total_s is inf"),
        ({"total_s": 1.0}, "total_s is 1"),
        ({"total_s": 1e9}, "total_s is 1e"),
        ({"started_time_s": -1.0}, "started_time_s"),
        ({"started_time_s": math.nan}, "started_time_s"),
        ({"started_time_s": 1e300}, "started_time_s"),
        ({"labels": {f"l{number}": "x" for number in range(100)}}, "100 labels"),
        ({"labels": {"engine": "x" * 10_000}}, "the label engine"),
        ({"labels": {"EVIL\n": "x"}}, "is not a phase's name"),
        ({"phases": (ColdStartPhase("x", 0, 1),) * 1000}, "1000 phases"),
        ({"phases": (ColdStartPhase('x"} 1', 0, 1),)}, "is not a phase's name"),
        ({"phases": (ColdStartPhase("x", 0, math.inf),)}, "to inf s"),
        ({"phases": (ColdStartPhase("x", 0, 1, parent=7),)}, "a part of phase 7"),
    ],
)
async def test_what_no_start_is_like_is_refused_before_anything_is_kept(tmp_path: Path, change, told) -> None:
    message = cold_start_message(replace(COLD_START, **change))
    with pytest.raises(InvalidRequestError) as caught:
        cold_start_of(message)
    assert told in caught.value.message
    async with served(tmp_path) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await it.stub.ReportColdStart(pb.ReportColdStartRequest(cold_start=message))
        assert it.engine.calls == []


async def test_an_empty_report_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        with pytest.raises(grpc.aio.AioRpcError, match="INVALID_ARGUMENT"):
            await it.stub.ReportColdStart(pb.ReportColdStartRequest())


@given(st.binary(max_size=300))
def test_any_bytes_are_a_report_or_refused(data: bytes) -> None:
    try:
        message = pb.ColdStart.FromString(data)
    except Exception:
        return
    try:
        value = cold_start_of(message)
    except CachedError:
        return
    assert cold_start_of(cold_start_message(value)) == value


def test_a_long_client_name_is_cut() -> None:
    assert len(cold_start_of(cold_start_message(replace(REPORTED, client_name="x" * 5000))).client_name) == 256


# What is kept.


class Kept:
    """The store of starts over a real index."""

    def __init__(self, folder: Path, *models: str) -> None:
        self.clock = SystemClock()
        self.events = EventBus(self.clock)
        self.metrics = Metrics()
        self.faults: list[Exception | None] = []
        self.registry = Registry(Index(folder / "index"), self.faults.append)
        self.registry.load()
        for name in models:
            self.registry.update(self.registry.known(name), source="file:///x")
        self.starts = ColdStarts(self.registry, self.metrics, self.events, self.clock)
        self.starts.load()

    def close(self) -> None:
        self.starts.write()
        asyncio.run(self.registry.close())

    def series(self, name: str) -> int:
        return sum(line.startswith(f"{name}_count{{") for line in self.metrics.expose()[0].decode().splitlines())


def test_the_last_starts_of_a_model_are_kept_across_restarts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cold_starts, "KEPT", 3)
    kept = Kept(tmp_path, "tiny", "other")
    for number in range(5):
        kept.starts.report(replace(REPORTED, total_s=10.0 + number))
    kept.starts.report(replace(REPORTED, name="other"))
    before = kept.starts.of("tiny", 0)
    assert [start.total_s for start in before] == [12, 13, 14]
    assert [start.total_s for start in kept.starts.of("tiny", 2)] == [13, 14]
    assert all(start.reported_time_s > 0 for start in before)
    kept.close()

    again = Kept(tmp_path)
    assert again.starts.of("tiny", 0) == before
    assert again.series("cached_coldstart_phase_seconds") == 6  # from 0, so that rates have a first point
    again.starts.forget("tiny")
    assert again.starts.of("tiny", 0) == ()
    assert again.series("cached_coldstart_phase_seconds") == 3
    again.close()
    last = Kept(tmp_path)
    assert (last.starts.of("tiny", 0), len(last.starts.of("other", 0))) == ((), 1)
    last.close()


def test_a_model_that_nobody_knows_has_no_starts(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "tiny")
    with pytest.raises(NotFoundError, match="no model 'other'"):
        kept.starts.report(replace(REPORTED, name="other"))
    with pytest.raises(NotFoundError):
        kept.starts.of("other", 0)
    assert kept.series("cached_coldstart_seconds") == 0
    assert kept.events.recent == ()
    kept.close()


def test_models_with_starts_are_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cold_starts, "MODELS", 3)
    kept = Kept(tmp_path, *"abcde")
    for name in "abcade":
        kept.starts.report(replace(REPORTED, name=name))
    assert [name for name in "abcde" if kept.starts.of(name, 0)] == ["a", "d", "e"]
    assert kept.series("cached_coldstart_seconds") == 3
    kept.close()
    again = Kept(tmp_path)
    assert [name for name in "abcde" if kept.starts.of(name, 0)] == ["a", "d", "e"]
    again.close()


def test_damage_in_the_index_costs_that_models_starts_only(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "tiny", "other")
    kept.starts.report(REPORTED)
    kept.starts.report(replace(REPORTED, name="other"))
    kept.close()
    index = Index(tmp_path / "index")
    text = index._store._cache["coldstarts/tiny"]
    index._store.write({"coldstarts/tiny": json.dumps({"name": "tiny", "starts": [{"phases": 3}]})})
    assert text
    index.close()
    again = Kept(tmp_path)
    assert (again.starts.of("tiny", 0), len(again.starts.of("other", 0))) == ((), 1)
    assert any("coldstarts/tiny" in warning for warning in again.registry.index.warnings)
    again.close()


def test_starts_are_counted_by_model_and_phase_and_told(tmp_path: Path) -> None:
    kept = Kept(tmp_path, "tiny")
    phases = [ColdStartPhase(f"mine{number}", 0.0, 1.0) for number in range(40)]
    for _ in range(3):
        kept.starts.report(replace(REPORTED, phases=(*REPORTED.phases, *phases)))
    text = kept.metrics.expose()[0].decode()
    assert 'cached_coldstart_phase_seconds_count{model="tiny",phase="download"} 3.0' in text
    assert 'cached_coldstart_phase_seconds_sum{model="tiny",phase="download"} 9.0' in text
    assert 'cached_coldstart_phase_seconds_sum{model="tiny",phase="other"} 3.0' in text
    assert 'cached_coldstart_seconds_sum{model="tiny"} 12.0' in text
    assert kept.series("cached_coldstart_phase_seconds") == 4 <= len(COLD_START_PHASES) + 1
    event = kept.events.recent[-1]
    assert (event.kind, event.name) == ("coldstart.reported", "tiny")
    assert event.message == "worker.py started with tiny in 4.00 s"
    assert event.fields == {"total_s": "4.000", "longest_phase": "download", "from_level": "l3"}
    kept.close()


def test_overlaps_of_a_phase_count_once() -> None:
    phases = [
        ColdStartPhase("download", 0.0, 4.0),
        ColdStartPhase("download", 2.0, 6.0),
        ColdStartPhase("download", 3.0, 3.5),
        ColdStartPhase("mine", 0.0, 2.0),
        ColdStartPhase("yours", 1.0, 3.0),
        ColdStartPhase("part", 7.0, 9.0, parent=0),
    ]
    random.Random(3).shuffle(phases)
    assert phase_seconds(phases) == {"download": 6.0, "other": 3.0}


# What is shown.


def start(total_s: float, level: str = "l1", imports_s: float = 1.0) -> ColdStart:
    phases = (ColdStartPhase("imports", 0.0, imports_s), ColdStartPhase("warmup", imports_s, total_s))
    return replace(COLD_START, total_s=total_s, phases=phases, labels={"from_level": level})


def test_the_last_start_is_shown_as_table_and_chart_with_those_before_it(cached) -> None:
    cached.engine.started = [start(9.0), COLD_START]
    ran = cached("coldstart", "tiny")
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0].startswith("tiny: worker.py started in 4.00 s, ")
    assert lines[1] == "engine mine, from_level l3"
    table = {line.split("  ")[0].strip(): line.split() for line in lines}
    assert table["download"][-1] == "s"
    imports = next(line for line in lines if line.startswith("imports "))
    assert imports.split()[1:] == ["0.00", "s", "2.00", "s", "2.00", "s", "-", "2.00", "s"]
    assert "  b8.s16 (running) (failed)" in ran.out
    assert any(set(line) >= {"█"} and line.startswith("download") for line in lines)
    assert "warmup 8.00 s, imports 1.00 s" in ran.out
    assert "No trend yet: 4 starts from l3 are needed." in ran.out
    assert cached.engine.calls[-1] == ("cold_starts", "tiny", 0)


def test_the_trend_compares_starts_from_the_same_level_and_names_what_got_slower(cached) -> None:
    slow = [start(12.0, imports_s=4.0) for _ in range(3)]
    cached.engine.started = [start(60.0, "l3"), *[start(6.0) for _ in range(4)], start(70.0, "l3"), *slow]
    ran = cached("coldstart", "tiny", "-n", "2")
    trend = ran.out.split("Median of the last 3 starts from l1 against the 4 before:")[1].splitlines()
    rows = {line.split("  ")[0].strip(): line.split() for line in trend if line}
    assert rows["whole start"][2:] == ["6.00", "s", "12.0", "s", "+100%", "slower"]
    assert rows["imports"][1:] == ["1.00", "s", "4.00", "s", "+300%", "slower"]
    assert ran.out.count("worker.py") == 3
    data = json.loads(cached("coldstart", "tiny", "-o", "json").out)
    assert len(data["starts"]) == 9
    assert data["trend"]["changes"][0] == {"phase": "whole start", "before_s": 6.0, "lately_s": 12.0}


def test_as_json_it_holds_phases_and_what_follows_from_them(cached) -> None:
    cached.engine.started = [COLD_START]
    data = json.loads(cached("coldstart", "tiny", "-o", "json").out)
    (shown,) = data["starts"]
    assert (shown["name"], shown["total_s"], shown["labels"]["engine"]) == ("tiny", 4.0, "mine")
    assert [phase["parent"] for phase in shown["phases"]] == [None, None, None, 2]
    assert {row["name"]: row["hidden_s"] for row in shown["rows"]}["imports"] == 2.0


def test_hostile_text_does_not_reach_the_terminal(cached) -> None:
    cached.engine.started = [replace(COLD_START, client_name="\x1b[2Jevil", labels={"engine": "\x1b]0;x\x07"})]
    out = cached("coldstart", "tiny").out
    assert "\x1b" not in out
    assert "\x07" not in out


def test_a_picture_is_written(cached, tmp_path: Path) -> None:
    cached.engine.started = [COLD_START]
    assert cached("coldstart", "tiny", "--svg", str(tmp_path / "start.svg")).code == 0
    assert (tmp_path / "start.svg").read_text().startswith("<svg")
    refused = cached("coldstart", "tiny", "--svg", str(tmp_path / "no/x.svg"))
    assert refused.code == 2
    assert f"cannot be written to {tmp_path}/no/x.svg: No such file" in refused.err


def test_a_model_without_starts(cached) -> None:
    ran = cached("coldstart", "tiny")
    assert (ran.code, ran.out) == (0, "")
    assert "no worker has told of a start with tiny yet" in ran.err
    assert json.loads(cached("coldstart", "tiny", "-o", "json").out) == {"name": "tiny", "starts": [], "trend": None}
