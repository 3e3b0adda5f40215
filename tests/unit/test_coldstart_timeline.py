"""A timeline as workers use it: real clocks, threads, an attached model, pictures, and the report to a daemon."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from xml.etree import ElementTree as ET

import pytest

import cached_client
from cached_client.coldstart import Timeline, timeline
from cached_client.coldstart.spans import MAX_DEPTH, MAX_SPANS
from cached_client.errors import InvalidRequestError, NotFoundError
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

_STARTED = """
import time
begun_s = time.time()
from cached_client.coldstart import Timeline
timeline = Timeline()
import json, sys
print(json.dumps([timeline.to_dict(), begun_s, time.time(), sorted(sys.modules)]))
"""


def by_name(found: Timeline) -> dict[str, tuple[float, float]]:
    return {span.name: (span.start_s, span.end_s) for span in found.spans()}


def test_it_begins_with_the_process_and_loads_neither_grpc_nor_numpy():
    asked_s = time.time()
    answer = subprocess.run([sys.executable, "-c", _STARTED], capture_output=True, check=True, text=True).stdout
    data, begun_s, ended_s, modules = json.loads(answer)
    assert asked_s - 0.05 <= data["started_time_s"] <= begun_s  # /proc tells it to 10 ms
    first = data["phases"][-1]
    assert first["name"] == "process_start"
    assert begun_s <= data["started_time_s"] + first["end_s"] <= ended_s
    assert {"grpc", "numpy", "torch", "google.protobuf"}.isdisjoint(modules)


def test_it_begins_when_the_start_was_asked_for():
    found = Timeline(requested_time_s=time.time() - 1000)
    assert [span.name for span in found.spans()] == ["container_start", "process_start"]
    (begin_s, end_s), (begun_s, _) = by_name(found).values()
    assert begin_s == 0
    assert end_s == begun_s > 0
    assert found.total_s == pytest.approx(1000, abs=5)
    assert found.breakdown().unaccounted_s == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("container_s", "expected"),
    [
        (None, ["process_start"]),
        (14.0, ["container_start", "process_start"]),
        (10.0, ["process_start"]),
        (10_000.0, ["process_start"]),
    ],
)
def test_a_container_that_has_long_been_running_is_not_waited_for_again(monkeypatch, container_s, expected):
    monkeypatch.setattr(timeline, "age_s", lambda: 10.0)
    monkeypatch.setattr(timeline, "container_age_s", lambda: container_s)
    found = Timeline()
    assert [span.name for span in found.spans()] == expected
    assert found.total_s == pytest.approx(14.0 if len(expected) == 2 else 10.0)


def in_namespace(command: str) -> list[str]:
    """The phases of a timeline that is made by ``command`` in a PID namespace of its own, as in a container."""
    words = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "sh", "-c", command, "-"]
    code = "from cached_client.coldstart import Timeline; print(*[span.name for span in Timeline().spans()])"
    try:
        done = subprocess.run([*words, sys.executable, code], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("needs unshare(1) of util-linux")
    if "unshare:" in done.stderr:
        pytest.skip(f"needs a PID namespace of its own: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_in_a_container_it_begins_with_the_first_process():
    assert in_namespace('sleep 0.1; "$1" -c "$2"; true') == ["container_start", "process_start"]
    assert in_namespace('exec "$1" -c "$2"') == ["process_start"]  # it is the first process


def test_a_load_within_an_old_process_begins_now():
    found = Timeline(since_process_start=False)
    assert found.spans() == []
    assert found.total_s == 0


def test_blocks_nest_and_threads_begin_anew():
    found = Timeline(since_process_start=False)
    other = Timeline(since_process_start=False)

    def beside(parent):
        with found.phase("download"), found.phase("part"):
            pass
        with found.phase("copy", parent=parent):
            pass

    with found.phase("load") as load, other.phase("elsewhere"), found.phase("step"):
        thread = threading.Thread(target=beside, args=(load,))
        thread.start()
        thread.join()
    names = [span.name for span in found.spans()]
    parents = {span.name: names[span.parent] if span.parent is not None else None for span in found.spans()}
    # What is around `step` for this timeline is hidden by the other one's block.
    assert parents == {"load": None, "step": None, "download": None, "part": "download", "copy": "load"}
    assert [(span.name, span.parent) for span in other.spans()] == [("elsewhere", None)]


@pytest.mark.parametrize("phases", [0, 5])
def test_a_phase_of_another_timeline_is_no_parent(phases):
    found, other = Timeline(since_process_start=False), Timeline(since_process_start=False)
    foreign = [other.begin("elsewhere") for _ in range(3)][-1]
    for _ in range(phases):
        found.begin("own")
    found.begin("begun", parent=foreign)
    found.add("added", 1.0, 2.0, parent=foreign)
    with found.phase("block", parent=foreign):
        pass
    assert [(span.name, span.parent) for span in found.spans()[phases:]] == [
        ("begun", None),
        ("added", None),
        ("block", None),
    ]


def test_a_phase_that_raises_is_marked_and_ends():
    found = Timeline(since_process_start=False)
    with pytest.raises(ZeroDivisionError), found.phase("compile"):
        _ = 1 // 0
    assert [(span.failed, span.running) for span in found.spans()] == [(True, False)]
    assert "compile (failed)" in found.table()


def test_a_phase_that_was_begun_is_ended_by_another_thread_and_runs_until_then():
    found = Timeline(since_process_start=False)
    phase = found.begin("download")
    assert found.spans()[0].running
    assert "download (running)" in found.chart()
    thread = threading.Thread(target=phase.end)
    thread.start()
    thread.join()
    ended = found.spans()
    phase.end(failed=True)  # the first end counts
    assert found.spans() == ended
    assert not ended[0].running


def test_it_is_bounded_in_number_and_depth():
    found = Timeline(since_process_start=False)
    phase = None
    for _ in range(MAX_SPANS + 10):
        phase = found.begin("step", parent=phase)
    spans = found.spans()
    depths: list[int] = []
    for span in spans:
        depths.append(0 if span.parent is None else depths[span.parent] + 1)
    assert (len(spans), found.dropped, max(depths)) == (MAX_SPANS, 10, MAX_DEPTH - 1)


@pytest.mark.parametrize("name", ["", "Load", "a b", "x" * 65, "\x1b[31m", "9"])
def test_names_that_cannot_be_are_refused(name):
    found = Timeline(since_process_start=False)
    with pytest.raises(InvalidRequestError, match="not a phase's name"):
        found.begin(name)
    with pytest.raises(InvalidRequestError), found.phase("a", after="B"):
        pass
    with pytest.raises(InvalidRequestError, match="ends before it begins"):
        found.add("a", 2.0, 1.0)
    with pytest.raises(InvalidRequestError):
        found.label(engine="x" * 300)


def test_pictures_show_each_phase():
    found = Timeline(since_process_start=False)
    began_s = time.monotonic()
    found.add("download", began_s, began_s + 10)
    found.add("imports", began_s, began_s + 4)
    found.add("load", began_s + 10, began_s + 12)
    table = found.table().splitlines()
    assert table[0].split() == ["PHASE", "START", "TOTAL", "SELF", "CRITICAL", "HIDDEN"]
    imports = next(line for line in table if line.startswith("imports"))
    assert imports.split() == ["imports", "0.00", "s", "4.00", "s", "4.00", "s", "-", "4.00", "s"]
    chart = found.chart(60, ascii_only=True).splitlines()
    assert [line.split()[0] for line in chart[:3]] == ["download", "imports", "load"]
    solid, light = ([line.count(mark) for line in chart[:3]] for mark in "#.")
    columns = sum(solid)
    # The figures at the end of a line have points, too.
    assert (solid, light) == ([35, 0, 7], [1, 15, 1])
    assert columns == 42
    assert max(map(len, chart[:3])) == 60
    picture = ET.fromstring(found.svg("a <title> & more"))
    texts = [item.text for item in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"download", "imports", "load"} <= set(texts)
    assert texts[0].startswith("a <title> & more, ")
    assert "href" not in found.svg()


def test_json_holds_what_was_recorded_and_what_follows():
    found = Timeline(since_process_start=False, labels={"engine": "mine"})
    began_s = time.monotonic()
    found.add("download", began_s, began_s + 10)
    found.add("imports", began_s, began_s + 4)
    data = json.loads(found.to_json())
    assert data["labels"] == {"engine": "mine"}
    assert [item["name"] for item in data["phases"]] == ["download", "imports"]
    assert {item["name"]: round(item["hidden_s"]) for item in data["rows"]} == {"download": 0, "imports": 4}


def test_a_model_that_arrives_brings_its_phases_and_is_reported(tmp_path):
    files, _ = two_shards()
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        revision = daemon.add("tiny", files, arrived=False)
        found = Timeline(labels={"engine": "test"})
        with cache.attach("tiny") as model:
            with found.phase("imports"):
                for path, content in files.items():
                    daemon.announce("tiny", path, 0, len(content))
                for path in files:
                    model.read(path)
            daemon.complete("tiny")
            model.wait()
            found.add_model(model)
        spans = by_name(found)
        assert list(spans) == ["process_start", "imports", "attach", "download", "verify"]
        assert spans["attach"][1] == spans["download"][0] <= spans["download"][1] == spans["verify"][0]
        assert spans["imports"][0] < spans["download"][1]
        assert found.labels == {"engine": "test", "from_level": "l3"}
        found.report(cache)
    (told,) = daemon.cold_starts
    assert (told.name, told.revision, dict(told.labels)) == ("tiny", revision, found.labels)
    assert [phase.name for phase in told.phases] == list(spans)
    assert told.total_s >= max(phase.end_s for phase in told.phases)


def test_a_model_that_was_there_brings_only_the_attach(tmp_path):
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("tiny", two_shards()[0])
        found = Timeline(since_process_start=False)
        with cache.attach("tiny") as model:
            eventually(lambda: model.complete, "completion")
            found.add_model(model)
        assert "weights_to_gpu" not in by_name(found)
        assert "attach" in by_name(found)


def test_a_load_to_a_device_keeps_the_pace_of_what_arrives(tmp_path):
    files, tensors = two_shards()
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("tiny", files, arrived=False)
        with cache.attach("tiny") as model:
            for path, content in files.items():
                daemon.announce("tiny", path, 0, len(content))
            daemon.complete("tiny")
            assert len(model.state_dict(device="meta")) == len(tensors)
            found = Timeline(since_process_start=False)
            found.add_model(model)
    (copy,) = [span for span in found.spans() if span.name == "weights_to_gpu"]
    assert copy.after == "download"
    assert copy.start_s <= copy.end_s
    assert found.labels["gpu"] == "meta"


def test_a_report_names_a_model(tmp_path):
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        found = Timeline()
        with pytest.raises(InvalidRequestError, match="does not know its model"):
            found.report(cache)
        found.report(cache, "tiny", client_name="me")
        assert [(told.name, told.client_name) for told in daemon.cold_starts] == [("tiny", "me")]
        with pytest.raises(NotFoundError):
            cache.attach("other")
