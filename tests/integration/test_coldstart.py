"""Starts of workers, told to a real daemon: listed, counted, kept across restarts, forgotten with their model."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import cached_client
from cached_client._proto import cached_pb2 as pb
from cached_client.coldstart import Timeline
from tests.integration.harness import PAGES, DaemonProcess
from tests.integration.support import MB, SERVE, model_files, refused
from tests.unit.test_monitoring import labels_of


@pytest.fixture
def daemon(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path, data in model_files(3 * MB).items():
        (source / path).write_bytes(data)
    with DaemonProcess(tmp_path / "daemon", models={"tiny": {"source": f"file://{source}"}}, settings=PAGES) as daemon:
        yield daemon


def cached(daemon, *words):
    done = subprocess.run([*SERVE, "--socket", str(daemon.socket), *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start(daemon, **labels):
    """A worker's start, in this process."""
    timeline = Timeline(since_process_start=False, labels=labels)
    with cached_client.connect(str(daemon.socket)) as cache:
        with timeline.phase("build_model"):
            model = cache.attach("tiny", wait=True)
        timeline.add_model(model)
        with timeline.phase("warmup"), timeline.phase("b1.s16"):
            model.state_dict()
        timeline.report(cache)
        model.close()
    return timeline


def metrics(daemon):
    with urllib.request.urlopen(f"{daemon.http}/metrics") as response:
        return response.read().decode()


def test_starts_are_listed_counted_and_kept_across_restarts(daemon):
    cold = start(daemon, engine="mine")
    warm = start(daemon)
    assert {"attach", "download"} <= {span.name for span in cold.spans()}
    assert "download" not in {span.name for span in warm.spans()}
    assert (cold.labels["from_level"], warm.labels["from_level"]) == ("l3", "l1")

    told = daemon.wait_event("coldstart.reported")
    assert (told["model"], told["from_level"]) == ("tiny", "l3")
    text = metrics(daemon)
    assert 'cached_coldstart_seconds_count{model="tiny"} 2.0' in text
    assert 'cached_coldstart_phase_seconds_count{model="tiny",phase="attach"} 2.0' in text
    assert 'cached_coldstart_phase_seconds_count{model="tiny",phase="download"} 1.0' in text
    assert 'cached_coldstart_phase_seconds_count{model="tiny",phase="other"} 2.0' in text
    exposed = {line.partition("{")[0] for line in text.splitlines() if line.startswith("cached_coldstart")}
    assert exposed == {name for name in labels_of() if name.startswith("cached_coldstart")}  # what alerts speak of

    before = json.loads(cached(daemon, "coldstart", "tiny", "-o", "json"))["starts"]
    assert [item["labels"] for item in before] == [cold.labels, warm.labels]
    assert before[0]["total_s"] == pytest.approx(cold.total_s)
    daemon.restart()
    assert json.loads(cached(daemon, "coldstart", "tiny", "-o", "json"))["starts"] == before
    assert 'cached_coldstart_phase_seconds_count{model="tiny",phase="download"} 0.0' in metrics(daemon)

    for _ in range(3):
        start(daemon)
    shown = cached(daemon, "coldstart", "tiny", "-n", "3")
    assert "Median of the last 2 starts from l1 against the 2 before:" in shown
    assert shown.count("build_model") >= 3
    assert "█" in shown

    cached(daemon, "rm", "tiny")
    assert json.loads(cached(daemon, "coldstart", "tiny", "-o", "json"))["starts"] == []  # the catalog still knows it
    assert "cached_coldstart_seconds_count" not in metrics(daemon)


def test_what_a_daemon_does_not_know_or_believe_it_does_not_keep(daemon):
    with cached_client.connect(str(daemon.socket)) as cache:
        with refused("NOT_FOUND"):
            Timeline().report(cache, "unheard-of")
        timeline = Timeline(requested_time_s=1.0)
        with refused("INVALID_REQUEST") as told:
            timeline.report(cache, "tiny")
        assert "container_start" in told["message"]
        phases = [pb.ColdStartPhase(name="x", start_s=0, end_s=1)] * 65
        request = pb.ReportColdStartRequest(cold_start=pb.ColdStart(name="tiny", total_s=1, phases=phases))
        with refused("INVALID_REQUEST"):
            cache.connection.call(cache.connection.stub.ReportColdStart, request)
    assert "cached_coldstart_seconds_count" not in metrics(daemon)
    done = subprocess.run(
        [*SERVE, "--socket", str(daemon.socket), "coldstart", "unheard-of"], capture_output=True, text=True
    )
    assert done.returncode == 3


def test_the_doctor_looks_at_a_daemon_that_is_well(daemon):
    data = json.loads(cached(daemon, "doctor", "--quick", "-o", "json"))
    assert data["problems"] == 0
    # Other tests have daemons, too, and it is advice that several listen on one host.
    found = [item for item in data["findings"] if "other daemons" not in item["told"]]
    verdicts = {item["check"]: item["verdict"] for item in found}
    assert (verdicts["health"], verdicts["sockets"]) == ("ok", "ok")
    assert Path(sys.executable).exists()
