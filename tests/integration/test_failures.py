"""Every kind of failure, brought about in a real daemon: it is counted, told, logged, and the client's own error.

What each kind must have besides (documents, alerts, status) is checked for all of them in tests/docs/test_failures.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import cached_client
from cached.errors import all_errors
from cached_client import artifacts
from cached_client._proto import cached_pb2 as pb
from cached_client.errors import CacheError, HostError, error_of_reason
from tests.integration.harness import PAGES, DaemonProcess, wait_for
from tests.integration.support import MB, ROOT, SERVE, Site, flip_byte, model_files
from tests.integration.test_pull_faults import movers
from tests.kube_api import KubeServer
from tests.servers import CountingProxy, RcloneS3

WEIGHTS = "model.safetensors"
TRACE_ID = re.compile("[0-9a-f]{32}")

FAULTY = """
import sys
from cached.cache import model_cache

def cold_starts(self, ref, limit):
    try:
        return {}[ref]
    except KeyError as error:
        raise RuntimeError("nobody foresaw this") from error

model_cache.ModelCache.cold_starts = cold_starts
from cached.cli.main import main
sys.exit(main())
"""
"""A daemon one of whose methods has a fault, of the kind that nobody foresees."""


@dataclass(frozen=True)
class Case:
    """How a kind is brought about. ``asked``: it reaches a client as an error. ``chain``: what is in its causes."""

    reason: str
    provoke: Callable[[Site], None]
    event: str
    chain: str
    asked: bool = True
    fields: dict[str, str] = field(default_factory=dict)


def _pull(name: str, kind: Any, **settings: Any) -> Callable[[Site], None]:
    def provoke(site: Site) -> None:
        site.proxy.inject(kind, path=f"{name}/{WEIGHTS}", times=-1, **settings)
        site.pull(name)

    return provoke


def _quarantined(site: Site) -> None:
    site.pull("damaged")
    wait_for(lambda: site.summary("damaged").state == "ready" and not site.daemon.stats().active_load_count, "L2")
    site.evict("damaged", "l1")
    flip_byte(site.l2_blob("damaged", WEIGHTS), 100)
    site.proxy.inject("status", path=f"damaged/{WEIGHTS}", times=-1, status=503)
    site.verify("damaged", repair=True)
    site.check_served("damaged")


def _bad_name(site: Site) -> None:
    with site.rpc() as stub:
        stub.Describe(pb.DescribeRequest(ref="../m"))


def _in_use(site: Site) -> None:
    with site.attach("m"):
        site.evict("m", "l1")


def _level_failed(site: Site) -> None:
    """L2's folder of what arrives is a file for a while."""
    folder = site.daemon.l2_dir / "ingests"
    aside = folder.with_name("ingests-aside")
    folder.rename(aside)
    folder.write_text("")
    try:
        site.pull("onto-disk", level="l2")
    finally:
        folder.unlink()
        aside.rename(folder)


def _mover_failed(site: Site) -> None:
    site.proxy.inject("hold", path=f"unmoved/{WEIGHTS}", times=-1)
    site.begin("unmoved")
    killed: set[int] = set()
    deadline_s = time.monotonic() + 60
    while not site.describe("unmoved").last_error:
        assert time.monotonic() < deadline_s, "no error although every mover dies"
        for mover in set(movers(site)) - killed:
            wait_for(lambda: len(site.proxy.gets("unmoved")) > len(killed), "a range to be asked for")
            os.kill(mover, signal.SIGKILL)
            killed.add(mover)


def _bad_format(site: Site) -> None:
    with site.cache() as cache:
        cache.attach("no-weights", only=["*"])


def _bad_catalog(site: Site) -> None:
    site.daemon.catalog_file.write_text('{"models": {"m": {"source": "ftp://x"}}}')
    site.daemon.signal(signal.SIGHUP)
    site.daemon.wait_event("catalog.refused")
    site.reload_catalog()


def _denied_save(site: Site) -> None:
    with site.cache() as cache:
        artifacts.save(cache, site.folder, {"model": "m", "engine": "test"})


def _internal(site: Site) -> None:
    with site.rpc() as stub:
        stub.ListColdStarts(pb.ListColdStartsRequest(ref="m"))


def _nothing(_site: Site) -> None:
    """It is so from the start: its API is away."""


CASES = (
    Case("INVALID_REQUEST", _bad_name, "rpc.refused", "../m"),
    Case("INVALID_CONFIG", _bad_catalog, "catalog.refused", "ftp", asked=False),
    Case("NOT_FOUND", lambda site: site.pull("absent"), "load.failed", "absent"),
    Case("NO_SOURCE", lambda site: site.pull("unheard-of"), "rpc.refused", "unheard-of"),
    Case("BAD_FORMAT", _bad_format, "rpc.refused", "header", fields={"path": WEIGHTS}),
    Case("NO_ROOM", lambda site: site.pull("huge"), "load.failed", "huge", fields={"level": "l1"}),
    Case("IN_USE", _in_use, "rpc.refused", "m is in use by"),
    Case("INTEGRITY", lambda site: site.pull("replaced"), "load.failed", WEIGHTS, fields={"check": "catalog-sha256"}),
    Case("QUARANTINED", _quarantined, "degraded.began", "503"),
    Case("ORIGIN_UNAVAILABLE", _pull("away", "status", status=503), "load.failed", "503"),
    Case("ORIGIN_DENIED", _pull("denied", "status", status=403), "load.failed", "AccessDenied"),
    Case("ORIGIN_PROTOCOL", _pull("short", "short_length"), "load.failed", WEIGHTS),
    Case("ORIGIN_FAILED", _pull("refusing", "status", status=400), "load.failed", "400"),
    Case("OBJECT_CHANGED", _pull("changing", "etag"), "load.failed", WEIGHTS),
    Case("LEVEL_FAILED", _level_failed, "load.failed", ": because NotADirectoryError"),
    Case("MOVER_FAILED", _mover_failed, "mover.died", "killed by signal 9", asked=False),
    Case("CLUSTER_FAILED", _nothing, "degraded.began", "Connection refused", asked=False),
    Case("PERMISSION_DENIED", _denied_save, "descriptors.refused", "save"),
    Case("INTERNAL", _internal, "internal.error", ": because RuntimeError: nobody foresaw this: because KeyError"),
)
ELSEWHERE = {
    "UNAVAILABLE": "test_a_daemon_that_drains_says_so_and_counts_it",
    "ALREADY_RUNNING": "test_a_second_daemon_ends_with_one_line_for_people_and_one_for_programs",
    "LIMIT_EXCEEDED": "tests/fault/test_floods.py",
    "LOCAL_ONLY": "tests/integration/test_network.py: what only works on the host is refused",
    "TIMED_OUT": "tests/unit/test_cache_failures.py: the daemon's own limit is a minute's silence in an upload",
}
NAMES = (
    "m", "damaged", "onto-disk", "unmoved", "away", "denied", "short", "refusing", "changing", "replaced",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rclone_s3: RcloneS3) -> Iterator[Site]:
    """One daemon for all kinds."""
    folder = tmp_path_factory.mktemp("failures")
    rclone_s3.create_bucket("failures")
    with KubeServer() as kube:
        kubeconfig = kube.write_config(folder / "kubeconfig")  # … and then nobody listens there
    with CountingProxy(rclone_s3.endpoint_url) as proxy:
        site = Site(folder, rclone_s3, proxy, "failures", check=False, around=(sys.executable, "-c", FAULTY))
        site.settings |= PAGES | {
            "transfer": {"max_attempts": 1},
            "l1": {"capacity": "30MiB", "transient_capacity": "0B"},
            "l2": {"capacity": "60MiB"},
            "scrub": {"bytes_per_s": "0"},
            "fleet": {"node_labels": True, "node_name": "node-1"},
        }
        for seed, name in enumerate(NAMES):
            entry = {"sha256": {WEIGHTS: "0" * 64}} if name == "replaced" else {}
            site.add(name, model_files(MB // 4, seed=seed), **entry)
        site.add("huge", model_files(40 * MB, seed=50))
        site.add("no-weights", {"config.json": b"{}", WEIGHTS: b"\xff" * 1000})
        site.know("absent", {})
        site.daemon.environment["KUBECONFIG"] = str(kubeconfig)
        site.start()
        try:
            yield site
        finally:
            site.close()


def counted(daemon: DaemonProcess, reason: str) -> float:
    """By /metrics, as Prometheus sees it."""
    with urllib.request.urlopen(f"{daemon.http}/metrics") as response:
        lines = response.read().decode().splitlines()
    series = f'cached_failures_total{{reason="{reason}"}}'
    return next(float(line.split()[1]) for line in lines if line.startswith(series))


def remembered(site: Site, kind: str, reason: str) -> pb.Event:
    """The first event of a kind and reason among those that the daemon remembers, as `cached events` shows them."""
    with site.daemon.stub() as stub:
        for answer in stub.Watch(pb.WatchRequest(replay=True), timeout=60):
            event: pb.Event = answer.event
            if event.kind == kind and event.fields.get("reason") == reason:
                return event
    raise AssertionError(f"no event {kind} of {reason}")


def test_every_kind_is_brought_about_somewhere() -> None:
    assert {case.reason for case in CASES} | ELSEWHERE.keys() == all_errors().keys(), (
        "a new reason needs a Case in tests/integration/test_failures.py, or to be named in ELSEWHERE with where"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_a_kind_is_counted_told_logged_and_understood_by_the_client(place: Site, case: Case) -> None:
    daemon, error = place.daemon, None
    before = 0.0 if case.provoke is _nothing else counted(daemon, case.reason)
    try:
        case.provoke(place)
    except CacheError as raised:
        error = raised
    finally:
        place.proxy.heal()
    assert (error is not None) == case.asked, error

    # The client's own error, with fields and the trace id.
    if error is not None:
        assert error.reason == case.reason, error
        assert type(error) is type(error_of_reason(case.reason, ""))
        assert error.hint
        assert TRACE_ID.fullmatch(error.fields["trace_id"])
        assert {key: error.fields[key] for key in case.fields} == case.fields

    # The metric.
    wait_for(lambda: counted(daemon, case.reason) > before, f"{case.reason} to be counted")

    # The log: one line of JSON, with what came of what.
    line = daemon.wait_event(case.event, lambda item: item.get("reason") == case.reason and case.chain in item["chain"])
    assert line["logger"] == "cached.events"
    assert "\n" not in line["chain"]
    assert line["message"]
    if error is not None:
        lines = [item for item in daemon.log_events() if item.get("trace_id") == error.fields["trace_id"]]
        assert any(item.get("reason") == case.reason for item in lines), "the client's trace id leads to the log"

    # The event, as everyone who watches sees it.
    assert remembered(place, case.event, case.reason).fields["chain"]


def test_an_unforeseen_exception_is_in_the_log_once_and_its_text_stays_there(place: Site) -> None:
    before = len(place.daemon.log_events("internal.traceback"))
    with pytest.raises(CacheError) as caught, place.rpc() as stub:
        stub.ListColdStarts(pb.ListColdStartsRequest(ref="secret-name"))
    error = caught.value
    assert "secret-name" not in f"{error} {error.fields}"
    assert "KeyError" not in f"{error} {error.fields}"
    trace_id = error.fields["trace_id"]
    assert trace_id in error.hint
    (line,) = place.daemon.log_events("internal.traceback")[before:]
    assert line["trace_id"] == trace_id
    assert line["exception"].count("Traceback (most recent call last)") == 2
    assert "nobody foresaw this" in line["exception"]
    of_it = [item for item in place.daemon.log_events() if item.get("trace_id") == trace_id]
    assert [item["event"] for item in of_it if "exception" in item] == ["internal.traceback"]


def test_a_daemon_that_drains_says_so_and_counts_it(site: Site) -> None:
    site.add("m", model_files(MB))
    held = site.hold(WEIGHTS, after_bytes=1000)
    site.settings |= {"daemon": {"drain_timeout_s": 60.0}, **PAGES}
    site.check = False
    site.start()
    site.begin("m")
    assert held.reached.wait(60)
    site.daemon.signal(signal.SIGTERM)
    site.daemon.wait_event("daemon.draining")
    with pytest.raises(cached_client.NotReadyError) as caught, site.rpc() as stub:
        list(stub.Pull(pb.PullRequest(ref="m")))
    assert caught.value.fields["phase"] == "draining"
    assert counted(site.daemon, "UNAVAILABLE") == 1
    (line,) = site.daemon.log_events("rpc.refused")
    assert (line["reason"], line["level"], line["chain"]) == ("UNAVAILABLE", "info", "the daemon is draining")
    assert line["trace_id"] == caught.value.fields["trace_id"]
    held.release()
    assert site.daemon.wait() == 0


def test_a_second_daemon_ends_with_one_line_for_people_and_one_for_programs(place: Site) -> None:
    done = subprocess.run(
        [*SERVE, "serve", "--config", str(place.daemon.config_file)],
        capture_output=True, text=True, timeout=60, env=place.daemon.environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    line = json.loads(next(line for line in done.stderr.splitlines() if "daemon.failed" in line))
    assert line["reason"] == "ALREADY_RUNNING"
    assert str(place.daemon.pid) in line["chain"]
    assert "error: " in done.stderr
    assert "hint: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("pull", "absent"), 3, "absent"),
        (("pull", "unheard-of"), 3, "--source"),
        (("pull", "huge"), 5, "huge"),
        (("pull", "replaced"), 6, WEIGHTS),
        (("coldstart", "m"), 1, "journalctl -u cached | grep "),
    ],
)
def test_a_command_says_what_was_wrong_then_what_to_do(
    place: Site, arguments: tuple[str, ...], code: int, told: str
) -> None:
    done = subprocess.run(
        [*SERVE, "--socket", str(place.daemon.socket), *arguments],
        capture_output=True, text=True, timeout=60, env=place.daemon.environment, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr
    assert [line.split(":")[0] for line in lines if line.startswith(("error:", "hint:"))] == ["error", "hint"], lines
    assert told in done.stderr


def test_a_host_error_has_its_fields_on_the_client() -> None:
    error = error_of_reason("LEVEL_FAILED", "no", fields={"level": "l2", "path": "/x"})
    assert isinstance(error, HostError)
    assert error.fields == {"level": "l2", "path": "/x"}
