"""gRPC over TCP: who comes in with which certificate, and what of the daemon can be had from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cached_client._proto import cached_pb2 as pb
from cached_client.errors import CacheError, DaemonUnavailableError, PermissionDeniedError
from cached_client.network import NetworkConnection, TlsFiles
from tests.certificates import Authority, Pair
from tests.integration.harness import DaemonProcess, wait_for


@dataclass
class Served:
    daemon: DaemonProcess
    authority: Authority
    folder: Path

    @property
    def address(self) -> str:
        return "localhost:" + self.daemon.wait_event("daemon.ready")["tcp"].rpartition(":")[2]

    def files(self, pair: Pair) -> TlsFiles:
        return TlsFiles(str(self.authority.file), str(pair.cert), str(pair.key))

    def connect(self, pair: Pair) -> NetworkConnection:
        return NetworkConnection(self.address, self.files(pair))

    def stats(self, pair: Pair) -> pb.StatsResponse:
        with self.connect(pair) as connection:
            return connection.call(connection.stub.Stats, pb.StatsRequest(), timeout_s=30)


def tcp_settings(authority: Authority, server: Pair) -> dict[str, Any]:
    return {
        "listen": "localhost:0",
        "cert": str(server.cert),
        "key": str(server.key),
        "client_ca": str(authority.file),
        "clients": ["viewer"],
        "operators": ["operator"],
    }


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tcp")
    authority = Authority(folder / "tls")
    (folder / "m").mkdir()
    (folder / "m" / "config.json").write_text("{}")
    settings = {"tcp": tcp_settings(authority, authority.issue("server"))}
    models = {"m": {"source": f"file://{folder}/m"}}
    with DaemonProcess(folder / "d", settings=settings, models=models) as daemon:
        yield Served(daemon, authority, folder)


def test_an_operator_does_everything_that_needs_no_descriptor(served: Served) -> None:
    with served.connect(served.authority.issue("operator", alternative=None)) as connection:
        stub: Any = health_pb2_grpc.HealthStub(connection.channel)
        assert stub.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        *_, last = connection.stream(connection.stub.Pull, pb.PullRequest(ref="m"), timeout_s=60)
        assert last.progress.phase == pb.PullProgress.PHASE_READY
        assert [model.name for model in connection.call(connection.stub.List, pb.ListRequest()).models] == ["m"]
        connection.call(connection.stub.Evict, pb.EvictRequest(ref="m"), timeout_s=30)


@pytest.mark.parametrize("method", ["Attach", "Detach", "ReportColdStart", "FindArtifact", "PutArtifact"])
def test_what_belongs_to_processes_of_the_host_is_refused_and_names_the_socket(served: Served, method: str) -> None:
    with served.connect(served.authority.issue("operator", alternative=None)) as connection:
        request: Any = getattr(pb, f"{method}Request")()
        call: Any = getattr(connection.stub, method)
        with pytest.raises(grpc.RpcError) as raised:
            answer = call(iter([request]) if method == "PutArtifact" else request, timeout=30)
            list(answer if method == "Attach" else [])
    assert raised.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "do not cross a network" in raised.value.details()
    assert str(served.daemon.socket).encode() in dict(raised.value.trailing_metadata())["grpc-status-details-bin"]


def test_every_method_is_for_someone() -> None:
    from cached.rpc.network import LOOKING, OPERATING

    methods = {method.name for method in pb.DESCRIPTOR.services_by_name["CacheService"].methods}
    local = {"Attach", "Detach", "ReportColdStart", "FindArtifact", "PutArtifact"}
    assert methods == LOOKING | OPERATING | local
    assert not LOOKING & OPERATING


def test_a_viewer_looks_and_changes_nothing(served: Served) -> None:
    with served.connect(served.authority.issue("viewer", alternative=None)) as connection:
        assert connection.call(connection.stub.Stats, pb.StatsRequest(), timeout_s=30).version
        with pytest.raises(PermissionDeniedError, match="Evict is for operators, and viewer is not one"):
            connection.call(connection.stub.Evict, pb.EvictRequest(ref="m"), timeout_s=30)
        with pytest.raises(PermissionDeniedError, match="Pull is for operators"):
            list(connection.stream(connection.stub.Pull, pb.PullRequest(ref="m"), timeout_s=30))


def test_a_name_in_subject_alt_name_counts_and_then_the_common_name_does_not(served: Served) -> None:
    assert served.stats(served.authority.issue("anybody", alternative="viewer")).version
    with pytest.raises(PermissionDeniedError, match=r"names \(elsewhere\) are not on the daemon's list"):
        served.stats(served.authority.issue("operator", alternative="elsewhere", file="misleading"))


def test_a_name_that_is_not_on_the_list_gets_no_answer_at_all(served: Served) -> None:
    with served.connect(served.authority.issue("stranger", alternative=None)) as connection:
        for method, request in ((connection.stub.Stats, pb.StatsRequest()), (connection.stub.List, pb.ListRequest())):
            with pytest.raises(PermissionDeniedError, match=r"names \(stranger\)"):
                connection.call(method, request, timeout_s=30)
        with pytest.raises(PermissionDeniedError, match=r"names \(stranger\)"):
            list(connection.stream(connection.stub.Attach, pb.AttachRequest(), timeout_s=30))
        stub: Any = health_pb2_grpc.HealthStub(connection.channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert raised.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.RpcError) as raised:
            list(stub.Watch(health_pb2.HealthCheckRequest(), timeout=30))
        assert raised.value.code() == grpc.StatusCode.UNIMPLEMENTED


def handshake(served: Served, context: ssl.SSLContext) -> str:
    """Makes a TLS connection and waits for the first bytes of HTTP/2; what TLS it was. Raises OSError."""
    host, _, port = served.address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=30) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as tls,
    ):
        tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
        if not tls.recv(9):
            raise ConnectionResetError
        return tls.version() or ""


def context_of(served: Served, pair: Pair | None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=served.authority.file)
    context.set_alpn_protocols(["h2"])
    if pair is not None:
        context.load_cert_chain(pair.cert, pair.key)
    return context


def test_only_a_valid_certificate_of_the_right_authority_makes_a_connection(served: Served, tmp_path: Path) -> None:
    good = served.authority.issue("viewer", alternative=None)
    assert handshake(served, context_of(served, good)) == "TLSv1.3"
    other = Authority(tmp_path, "authority")  # of the same name
    refused = {
        "none": None,
        "another authority's": other.issue("viewer", alternative=None),
        "expired": served.authority.issue("viewer", alternative=None, valid_days=-1, file="expired"),
    }
    for what, pair in refused.items():
        with pytest.raises(OSError, match=r".*"):
            pytest.fail(f"{what}: {handshake(served, context_of(served, pair))}")
        if pair is not None:
            with pytest.raises(DaemonUnavailableError):
                served.stats(pair)
    assert served.stats(good).version


def speaks(client: ssl.SSLContext, authority: Authority) -> str:
    """What TLS the client makes with a server that takes any."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.set_ciphers("DEFAULT@SECLEVEL=0")
    server.minimum_version = ssl.TLSVersion.TLSv1
    pair = authority.issue("any")
    server.load_cert_chain(pair.cert, pair.key)
    near, far = socket.socketpair()
    with near, far, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.wrap_socket, far, server_side=True)
        with client.wrap_socket(near, server_hostname="localhost") as tls:
            accepted.result().close()
            return tls.version() or ""


@pytest.mark.parametrize(("least", "works"), [("TLSv1_2", True), ("TLSv1_1", False), ("TLSv1", False)])
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_tls_before_1_2_is_refused(served: Served, least: str, works: bool) -> None:
    context = context_of(served, served.authority.issue("viewer", alternative=None))
    context.set_ciphers("DEFAULT@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion[least]
    if works:
        assert handshake(served, context) == "TLSv1.2"
        return
    assert speaks(context, served.authority) == least.replace("_", ".")  # so it is not the client that cannot
    with pytest.raises(ssl.SSLError):
        handshake(served, context)


def test_plain_text_is_not_answered(served: Served) -> None:
    with grpc.insecure_channel(served.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError) as raised:
            stub.Check(health_pb2.HealthCheckRequest(), timeout=20)
    assert raised.value.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    host, _, port = served.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as raw:
        raw.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        try:
            while more := raw.recv(4096):
                answer += more
        except ConnectionResetError:
            pass
    assert b"HTTP" not in answer


def test_a_daemon_that_the_caller_does_not_trust_gets_no_call(served: Served, tmp_path: Path) -> None:
    pair = served.authority.issue("viewer", alternative=None)
    files = replace(served.files(pair), ca=str(Authority(tmp_path, "other").file))
    with NetworkConnection(served.address, files) as connection, pytest.raises(DaemonUnavailableError) as raised:
        connection.call(connection.stub.Stats, pb.StatsRequest(), timeout_s=30)
    assert "tcp.client_ca" in raised.value.hint


def command(variables: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [Path(sys.executable).with_name("cached"), *arguments],
        env={**os.environ, **variables}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_command_speaks_to_a_daemon_elsewhere(served: Served) -> None:
    pair = served.authority.issue("operator", alternative=None)
    variables = {
        "CACHED_ADDRESS": served.address,
        "CACHED_TLS_CA": str(served.authority.file),
        "CACHED_TLS_CERT": str(pair.cert),
        "CACHED_TLS_KEY": str(pair.key),
    }
    assert json.loads(command(variables, "ls", "-o", "json").stdout)[0]["name"] == "m"
    assert f"serving on {served.address}" in command(variables, "health").stdout
    refused = command(variables, "run", "m", "--", "true")
    assert refused.returncode == 1
    assert f"use its socket {served.daemon.socket}" in refused.stderr
    lacking = command({"CACHED_ADDRESS": served.address}, "ls")
    assert lacking.returncode == 2
    assert "--tls-ca" in lacking.stderr


def test_certificates_are_exchanged_while_it_serves(tmp_path: Path) -> None:
    old, new = Authority(tmp_path / "old", "old"), Authority(tmp_path / "new", "new")
    server, again = old.issue("server"), new.issue("server")
    settings = {"tcp": tcp_settings(old, server)}
    with DaemonProcess(tmp_path / "d", settings=settings) as daemon:
        served = Served(daemon, old, tmp_path)
        before, after = old.issue("viewer", alternative=None), new.issue("viewer", alternative=None)
        assert served.stats(before).version

        server.cert.write_bytes(again.cert.read_bytes())  # without its key: refused, and all stays
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: daemon.log_events("tls.refused"), "the refusal")
        assert served.stats(before).version
        assert any("are no pair" in reason for reason in daemon.stats().degraded)

        server.key.write_bytes(again.key.read_bytes())
        shutil.copy(new.file, old.file)
        daemon.signal(signal.SIGHUP)
        wait_for(lambda: daemon.log_events("tls.loaded"), "the new certificates")
        assert served.stats(after).version  # both sides are new now
        with pytest.raises(CacheError):
            served.stats(before)
        assert not daemon.stats().degraded

        settings["tcp"] |= {"clients": ["somebody"]}
        daemon.write_config(settings)
        daemon.signal(signal.SIGHUP)
        with pytest.raises(PermissionDeniedError):
            while True:
                served.stats(after)


def test_a_listener_that_lacks_something_does_not_start(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    settings = {"tcp": tcp_settings(authority, authority.issue("server")) | {"client_ca": ""}}
    daemon = DaemonProcess(tmp_path / "d", settings=settings)
    daemon.start(wait=False)
    assert daemon.wait() == 1
    assert "tcp.client_ca is not: TCP is served with mutual TLS or not at all" in daemon.log()
    assert not daemon.socket.exists()
