"""The daemon's own life: start, refusal of a second one, catalog reload, drain, kill and restart, and its pages."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import socket
import stat
import struct
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import cached_client
from cached_client._proto import cached_pb2 as pb
from cached_client.errors import DaemonUnavailableError, NotReadyError
from tests.integration.harness import PAGES, DaemonProcess, wait_for
from tests.integration.support import safetensors

ARENA_BYTES = 64 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "one", settings=PAGES) as process:
        yield process


def slice_ns(thread: int) -> int:
    """The time slice that the kernel has for a thread (sched_getattr(2)); 0 where it tells none."""
    number, answer = {"x86_64": 315, "aarch64": 275}.get(platform.machine()), ctypes.create_string_buffer(48)
    if number is None or ctypes.CDLL(None).syscall(number, thread, answer, len(answer), 0):
        return 0
    return int(struct.unpack("=IIQiIQQQ", answer.raw)[5])


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_it_serves_and_says_where_and_with_what(daemon: DaemonProcess) -> None:
    ready = daemon.wait_event("daemon.ready")
    assert ready["socket"] == str(daemon.socket)
    assert " of " in ready["l1"]
    assert "l2" in ready
    for path in (daemon.socket, daemon.descriptor_socket):
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(daemon.state_dir.stat().st_mode) == 0o700
    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = health.Check(health_pb2.HealthCheckRequest(service="cached.v1.CacheService"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert {level.level for level in daemon.stats().levels} >= {pb.LEVEL_L1, pb.LEVEL_L2}


def test_its_threads_have_shorter_slices_than_what_moves_bytes(daemon: DaemonProcess, tmp_path: Path) -> None:
    usual_ns = slice_ns(os.getpid())
    if not usual_ns:
        pytest.skip("a kernel before 6.12, which tells no slices")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(safetensors(100_000, seed=1))
    with daemon.stub() as stub:
        for progress in stub.Pull(pb.PullRequest(ref="m", source=f"file://{tmp_path}/model")):
            assert progress
    threads = [int(task.name) for task in Path(f"/proc/{daemon.pid}/task").iterdir()]
    assert {slice_ns(thread) for thread in threads} == {1_000_000}
    movers = psutil.Process(daemon.pid).children()
    assert movers
    assert {slice_ns(task.id) for mover in movers for task in mover.threads()} == {usual_ns}


def test_its_pages(daemon: DaemonProcess) -> None:
    assert get(daemon.http + "/healthz")[0] == 200
    assert get(daemon.http + "/readyz") == (200, "ready\n")
    status, metrics = get(daemon.http + "/metrics")
    assert status == 200
    assert "cached_ready 1.0" in metrics
    assert 'cached_level_capacity_bytes{level="l1"}' in metrics
    assert get(daemon.http + "/")[0] == 200


def test_its_threads_and_those_of_movers_share_their_heap(daemon: DaemonProcess, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    daemon.write_catalog({"m": {"source": f"file://{source}"}})
    daemon.signal(signal.SIGHUP)
    daemon.wait_event("catalog.loaded", lambda item: item["models"] == 1)
    with cached_client.connect(str(daemon.socket)) as cache, cache.attach("m", timeout_s=60) as model:
        assert model.read("config.json", timeout_s=60) == b"{}"
        pids = [daemon.pid, *(mover.pid for mover in psutil.Process(daemon.pid).children())]
        assert len(pids) > 1
        assert [arenas_of_threads(pid) for pid in pids] == [0] * len(pids)
    assert arenas_of_threads(os.getpid()) > 0, "they cannot be told from other memory"


def arenas_of_threads(pid: int) -> int:
    """Where its C library has reserved memory for threads of their own: 64 MiB, of which the first part is used."""
    maps = re.findall(r"^(\w+)-(\w+) (\S+)", Path(f"/proc/{pid}/maps").read_text(), re.MULTILINE)
    return sum(
        (used, kept) == ("rw-p", "---p") and start == end and int(last, 16) - int(first, 16) == ARENA_BYTES
        for (first, end, used), (start, last, kept) in pairwise(maps)
    )


@pytest.mark.parametrize("shared", ["state_dir", "socket"])
def test_a_second_daemon_refuses_and_names_the_first(
    daemon: DaemonProcess, tmp_path: Path, shared: str, fault_figure: Callable[[str], None]
) -> None:
    value = str(daemon.state_dir if shared == "state_dir" else daemon.socket)
    second = DaemonProcess(tmp_path / "two", settings={"daemon": {shared: value}})
    try:
        began_s = time.monotonic()
        second.start(wait=False)
        assert second.wait() != 0
        fault_figure(
            f"a second daemon on the same {shared} had ended {time.monotonic() - began_s:.2f} s after its start"
        )
        assert f"pid {daemon.pid}" in second.log()
        assert value in second.log()
    finally:
        second.close()
    assert daemon.stats().version, "the first one must not notice"


def test_a_socket_of_any_characters_but_a_comma_is_served_and_found(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    with (
        # Not in tmp_path, whose length varies: a socket's path has 96 bytes at most.
        tempfile.TemporaryDirectory(prefix="cached ;?#%2C:@[é") as odd,
        DaemonProcess(Path(odd), models={"m": {"source": f"file://{source}"}}) as daemon,
        cached_client.connect(str(daemon.socket)) as cache,
        cache.attach("m", timeout_s=60) as model,
    ):
        assert model.read("config.json", timeout_s=60) == b"{}"
    daemon = DaemonProcess(tmp_path / "a,b").start(wait=False)
    try:
        assert daemon.wait() == 1
        assert "without a comma" in daemon.log()
    finally:
        daemon.close()


def test_sigterm_drains_and_leaves_no_socket(daemon: DaemonProcess) -> None:
    assert daemon.terminate() == 0
    assert not daemon.socket.exists()
    assert not daemon.descriptor_socket.exists()
    assert [item["event"] for item in daemon.log_events() if item["event"].startswith("daemon.")][-2:] == [
        "daemon.draining",
        "daemon.stopped",
    ]


def test_a_stream_is_told_that_the_daemon_stops(daemon: DaemonProcess) -> None:
    with daemon.stub() as stub:
        call = stub.Watch(pb.WatchRequest(replay=False))
        call.initial_metadata()  # the server has taken it up
        assert daemon.terminate() == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(call)
        assert call.code() is grpc.StatusCode.UNAVAILABLE, caught.value


def test_sockets_of_a_killed_daemon_do_not_matter(daemon: DaemonProcess) -> None:
    daemon.kill()
    assert daemon.socket.exists()
    daemon.start()
    assert daemon.stats().version


def test_the_catalog_is_reloaded_and_a_bad_one_keeps_the_old(daemon: DaemonProcess) -> None:
    source = {"source": f"file://{daemon.folder}/nothing"}
    daemon.write_catalog({"first": source})
    daemon.wait_event("catalog.loaded", lambda item: item["models"] == 1)
    daemon.catalog_file.write_text("{broken")
    refused = daemon.wait_event("catalog.refused")
    assert refused["kept_old"]
    with daemon.stub() as stub:
        assert [model.name for model in stub.List(pb.ListRequest()).models] == ["first"]
        watch = stub.Watch(pb.WatchRequest(replay=True), timeout=60)
        seen = next(response.event for response in watch if response.event.kind == "catalog.refused")
        watch.cancel()
        assert seen.fields["kept_old"] == "True"
    assert refused["level"] == "error"
    assert get(daemon.http + "/readyz")[0] == 200
    before = len(daemon.log_events("catalog.refused"))
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: len(daemon.log_events("catalog.refused")) > before, "SIGHUP reads the catalog again")


UNFORESEEN = (
    f'"priority": {"9" * 5000}', f'"size": "{"9" * 400}GB"', '"access": {"users": ["a\\u0000b"]}',
    '"access": {"groups": ["\\ud800"]}', '"\\ud800": "\\u0000"', f'"tier": {"[" * 100_000}',
)  # fmt: skip
"""Entries of a catalog that are no mistake of its author's alone: no reader made of them what it should."""


def test_whatever_a_catalog_holds_the_mended_one_is_read(daemon: DaemonProcess) -> None:
    source = {"source": f"file://{daemon.folder}/nothing"}
    for number, entry in enumerate(UNFORESEEN):
        before = len(daemon.log_events("catalog.refused"))
        write_entry(daemon, entry)
        wait_for(lambda: len(daemon.log_events("catalog.refused")) > before, entry[:80])  # noqa: B023 - called here
        assert any("catalog" in problem for problem in daemon.stats().degraded)
        daemon.write_catalog({f"m{number}": source})
        wait_for(lambda: f"m{number}" in names(daemon), f"the one after {entry[:80]}")  # noqa: B023 - called here
    assert not daemon.log_events("internal.error")


def test_a_daemon_starts_with_a_catalog_that_no_reader_foresaw(daemon: DaemonProcess) -> None:
    for entry in UNFORESEEN:
        write_entry(daemon, entry)
        daemon.restart()
        assert get(daemon.http + "/readyz")[0] == 503
    daemon.write_catalog({})
    wait_for(lambda: get(daemon.http + "/readyz")[0] == 200, "ready once the catalog is mended")


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 5000, '"/a\\u0000b"'], ids=["digits", "deep", "nul"])
def test_whatever_the_settings_hold_the_mended_ones_are_read(daemon: DaemonProcess, value: str) -> None:
    sound = daemon.config_file.read_text()
    daemon.config_file.write_text(f"{sound}\n[artifacts]\ndestination = {value}\n")
    daemon.signal(signal.SIGHUP)
    refused = daemon.wait_event("config.refused")
    assert str(daemon.config_file) in refused["error"]
    daemon.config_file.write_text(sound)
    daemon.write_catalog({"m": {"source": f"file://{daemon.folder}/nothing"}})
    daemon.signal(signal.SIGHUP)
    wait_for(lambda: "m" in names(daemon), "settings and catalog to be read")
    assert "cached_config_last_reload_successful 1.0" in get(daemon.http + "/metrics")[1]


def write_entry(daemon: DaemonProcess, entry: str) -> None:
    """A catalog of one model, with what stands in its entry as text."""
    fresh = daemon.catalog_file.with_suffix(".new")
    fresh.write_text(f'{{"models": {{"m": {{"source": "file:///nothing", {entry}}}}}}}')
    fresh.replace(daemon.catalog_file)


def names(daemon: DaemonProcess) -> list[str]:
    with daemon.stub() as stub:
        return [model.name for model in stub.List(pb.ListRequest()).models]


def test_a_catalog_behind_exchanged_links_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "config"
    for version, models in (("v1", "{}"), ("v2", '{"a": {"source": "file:///nothing"}}')):
        (folder / version).mkdir(parents=True)
        (folder / version / "catalog.json").write_text(f'{{"models": {models}}}')
    (folder / "now").symlink_to("v1")
    (folder / "catalog.json").symlink_to("now/catalog.json")
    with DaemonProcess(tmp_path / "one", settings={"daemon": {"catalog": str(folder / "catalog.json")}}) as daemon:
        (folder / "next").symlink_to("v2")
        os.replace(folder / "next", folder / "now")
        daemon.wait_event("catalog.loaded", lambda item: item["models"] == 1)


def test_without_its_catalog_it_serves_but_is_not_ready(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "one", settings=PAGES)
    daemon.catalog_file.unlink()
    with daemon:
        status, text = get(daemon.http + "/readyz")
        assert (status, "catalog" in text) == (503, True)
        assert get(daemon.http + "/healthz")[0] == 200
        daemon.write_catalog({})
        wait_for(lambda: get(daemon.http + "/readyz")[0] == 200, "ready once the catalog is there")


HANGING = """
import sys, threading
from cached.levels.disk import DiskLevel
DiskLevel.scan = lambda self: threading.Event().wait()
from cached.cli.main import main
sys.exit(main())
"""
"""A daemon whose disk does not answer when it asks what is there."""


def test_a_disk_that_hangs_at_the_start_keeps_nobody_from_asking_and_stopping(tmp_path: Path) -> None:
    daemon = DaemonProcess(tmp_path / "one", command=(sys.executable, "-c", HANGING)).start(wait=False)
    try:
        with cached_client.connect(str(daemon.socket)) as cache:

            def says_that_it_starts() -> bool:
                try:
                    cache.list()
                except DaemonUnavailableError:
                    return False  # not even that yet
                except NotReadyError:
                    return True
                return False

            wait_for(says_that_it_starts, "it to answer")
        assert daemon.terminate() == 0
    finally:
        daemon.close()


def test_a_taken_port_names_the_setting(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        daemon = DaemonProcess(tmp_path / "one", settings={"http": {"listen": listen}})
        try:
            daemon.start(wait=False)
            assert daemon.wait() != 0
            assert "http.listen" in daemon.log()
            assert not daemon.socket.exists()
        finally:
            daemon.close()


def test_a_state_folder_that_cannot_be_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    daemon = DaemonProcess(tmp_path / "one", settings={"daemon": {"state_dir": str(tmp_path / "file" / "state")}})
    try:
        daemon.start(wait=False)
        assert daemon.wait() != 0
        assert "daemon.state_dir" in daemon.log()
    finally:
        daemon.close()
