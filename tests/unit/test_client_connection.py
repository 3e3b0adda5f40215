"""Which socket, and what a connection survives."""

from __future__ import annotations

import math
import socket
import threading
from pathlib import Path

import pytest

import cached_client
from cached_client import connection as module
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import Connection, default_target, socket_path
from cached_client.errors import DaemonUnavailableError, InvalidRequestError, NotReadyError, TimeoutExpiredError
from cached_client.testing import FakeDaemon


@pytest.mark.parametrize(
    ("target", "path"),
    [
        ("/run/a.sock", "/run/a.sock"),
        ("unix:///run/a.sock", "/run/a.sock"),
        ("unix:/run/a.sock", "/run/a.sock"),
        ("unix:///run/with%20space", "/run/with space"),
    ],
)
def test_a_target_is_a_path_or_a_uri(target: str, path: str) -> None:
    assert socket_path(target) == Path(path)


def test_a_target_may_be_a_path_object(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.socket) as cache:
        daemon.add("m", {"config.json": b"{}"})
        assert cache.connection.path == daemon.socket
        try:
            model = cached_client.load("m", target=daemon.socket)
            assert cached_client.load("m", target=daemon.target) is model
        finally:
            cached_client.unload(target=daemon.socket)


def test_relative_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert socket_path("a.sock") == socket_path("unix:a.sock") == tmp_path / "a.sock"


@pytest.mark.parametrize(
    "target", ["", "unix:", "unix://", "unix:///", "/", "tcp://host:1", "https://host", "/" + "x" * 120, "/a,b.sock"]
)
def test_what_cannot_be_a_socket_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequestError):
        socket_path(target)


def test_a_comma_is_named_as_what_is_wrong_also_where_the_working_directory_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a,b"
    odd.mkdir()
    monkeypatch.chdir(odd)
    with pytest.raises(InvalidRequestError, match="comma") as caught:
        cached_client.connect("c.sock")
    assert "symbolic link" in caught.value.hint


def test_default_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, own = tmp_path / "system.sock", tmp_path / "cached" / "cached.sock"
    own.parent.mkdir()
    monkeypatch.setattr(module, "SYSTEM_SOCKET", str(system))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("CACHED_SOCKET", raising=False)

    assert default_target() == str(system), "nothing is there: the error is to name the system's socket"
    own.touch()
    assert default_target() == str(own)
    system.touch()
    assert default_target() == str(system)
    monkeypatch.setenv("CACHED_SOCKET", "/elsewhere.sock")
    assert default_target() == "/elsewhere.sock"


def test_a_path_with_odd_characters_works(tmp_path: Path) -> None:
    odd = tmp_path / "a b%20ü"
    odd.mkdir()
    daemon = FakeDaemon(odd)
    assert Connection(str(odd / "cached.sock")).path == daemon.socket
    with daemon, cached_client.connect(str(daemon.socket)) as cache:
        daemon.add("m", {"config.json": b"{}"})
        with cache.attach("m") as model:
            assert model.read("config.json") == b"{}"


def test_waits_for_a_daemon_that_starts_later(tmp_path: Path) -> None:
    daemon = FakeDaemon(tmp_path)
    starter = threading.Timer(0.3, daemon.start)
    with Connection(daemon.target) as connection:
        starter.start()
        try:
            connection.wait_ready(30.0)
            assert connection.call(connection.stub.Stats, pb.StatsRequest()).version == "fake"
        finally:
            starter.join()
            daemon.stop()


def test_a_socket_that_never_answers_is_a_daemon_that_is_not_there(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, Connection(str(tmp_path / "hangs.sock")) as connection:
        listener.bind(str(connection.path))
        listener.listen()
        with pytest.raises(DaemonUnavailableError, match=r"no answer within 0\.5 s") as caught:
            connection.wait_ready(0.5)
        assert "systemctl" in caught.value.hint


def test_what_a_daemon_said_while_it_started_is_told_when_its_last_answer_comes_too_late(tmp_path: Path) -> None:
    answers = [NotReadyError("it is starting"), TimeoutExpiredError("no answer within the time limit")]
    with FakeDaemon(tmp_path) as daemon, Connection(daemon.target) as connection:

        def call(*_, **__):
            raise answers.pop(0)

        connection.call = call  # type: ignore[method-assign]
        with pytest.raises(NotReadyError, match="starting"):
            connection.wait_ready(5.0)


def test_survives_a_restart_and_opens_again_after_close(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, Connection(daemon.target) as connection:
        connection.wait_ready(30.0)
        daemon.stop()
        with pytest.raises(DaemonUnavailableError):
            connection.call(connection.stub.Stats, pb.StatsRequest())
        daemon.start()
        connection.wait_ready(30.0)
        connection.close()
        connection.close()
        connection.wait_ready(30.0)


def test_a_method_of_a_connection_that_was_closed_meanwhile_raises_an_error_of_ours(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, Connection(daemon.target) as connection:
        stub = connection.stub
        connection.close()
        with pytest.raises(DaemonUnavailableError, match="connection was closed"):
            connection.call(stub.Stats, pb.StatsRequest())
        with pytest.raises(DaemonUnavailableError, match="connection was closed"):
            list(connection.stream(stub.Pull, pb.PullRequest(ref="m")))


def test_list_and_pull(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        revision = daemon.add("m", {"config.json": b"{}"})
        [summary] = cache.list()
        assert (summary.name, summary.revision, summary.state, summary.tier) == ("m", revision, "ready", "auto")
        assert summary.size_bytes == 2
        progress = list(cache.pull("m", tier="hot", level="l2", wait=False))
        assert [moment.phase for moment in progress] == ["resolving", "ready"]
        assert progress[-1].from_level == ""
        for wrong in ({"tier": "l1"}, {"level": "hot"}, {"level": "l3"}):
            with pytest.raises(InvalidRequestError, match="is not a"):
                list(cache.pull("m", **wrong))


@pytest.mark.parametrize("endless_s", [math.inf, 9e9, 1e300, pytest.param(10**400, id="large")])
def test_a_time_limit_without_end_is_none(tmp_path: Path, endless_s: float) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("m", {"config.json": b"{}"})
        cache.wait_ready(endless_s)
        assert cache.connection.call(cache.connection.stub.Stats, pb.StatsRequest(), timeout_s=endless_s)
        assert len(list(cache.pull("m", timeout_s=endless_s))) == 2
        with cache.attach("m", wait=True, timeout_s=endless_s) as model:
            assert model.wait(endless_s)
            assert model.read("config.json", endless_s)
        try:
            assert cached_client.load("m", target=daemon.target, timeout_s=endless_s).wait(endless_s)
        finally:
            cached_client.unload()
        daemon.add("late", {"config.json": b"{}"}, arrived=False)
        with cache.attach("late") as model:
            arrival = threading.Timer(0.2, daemon.complete, ["late"])
            arrival.start()
            assert model.wait(endless_s)
            arrival.join()


@pytest.mark.parametrize("past_s", [-1.0, -math.inf, math.nan])
def test_a_time_limit_that_has_passed_is_told(tmp_path: Path, past_s: float) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("m", {"config.json": b"{}"}, arrived=False)
        with cache.attach("m") as model, pytest.raises(TimeoutExpiredError):
            model.wait(past_s)
        with pytest.raises(TimeoutExpiredError):
            list(cache.pull("m", timeout_s=past_s))
