"""The daemon's own life: start, refusal of a second one, catalog reload, drain, kill and restart, and its pages."""

from __future__ import annotations

import os
import signal
import socket
import stat
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import cached_client
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess, wait_for


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with DaemonProcess(tmp_path / "one") as process:
        yield process


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


def test_its_pages(daemon: DaemonProcess) -> None:
    assert get(daemon.http + "/healthz")[0] == 200
    assert get(daemon.http + "/readyz") == (200, "ready\n")
    status, metrics = get(daemon.http + "/metrics")
    assert status == 200
    assert "cached_ready 1.0" in metrics
    assert 'cached_level_capacity_bytes{level="l1"}' in metrics
    assert get(daemon.http + "/")[0] == 200


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
    daemon = DaemonProcess(tmp_path / "one")
    daemon.catalog_file.unlink()
    with daemon:
        status, text = get(daemon.http + "/readyz")
        assert (status, "catalog" in text) == (503, True)
        assert get(daemon.http + "/healthz")[0] == 200
        daemon.write_catalog({})
        wait_for(lambda: get(daemon.http + "/readyz")[0] == 200, "ready once the catalog is there")


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
