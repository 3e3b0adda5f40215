"""How errors reach a worker: kinds by reason, fields, hints, and a message that stands alone."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

import cached_client
from cached.errors import CachedError, all_errors
from cached_client import errors
from cached_client.connection import Connection
from cached_client.errors import CacheError, error_of_reason, from_rpc_error
from cached_client.testing import FakeDaemon

PLAIN = {"INTERNAL", "LEVEL_FAILED", "MOVER_FAILED", "ALREADY_RUNNING", "LOCAL_ONLY"}
"""Reasons that a worker cannot treat in any particular way."""


@pytest.mark.parametrize("reason", sorted(all_errors()))
def test_every_reason_of_the_daemon_has_a_kind(reason: str) -> None:
    error = error_of_reason(reason, "message", hint="hint", fields={"path": "a"})
    assert (type(error) is CacheError) == (reason in PLAIN)
    assert (error.reason, error.message, error.hint, error.fields) == (reason, "message", "hint", {"path": "a"})


def test_kinds_are_related_as_in_the_daemon() -> None:
    for reason, theirs in all_errors().items():
        ours = type(error_of_reason(reason, ""))
        for base in theirs.__mro__[1:]:
            if issubclass(base, CachedError):
                assert isinstance(error_of_reason(reason, ""), type(error_of_reason(base.reason, ""))), (ours, base)


def test_text_says_what_to_do() -> None:
    assert str(CacheError("it failed", hint="try again")) == "it failed (try again)"
    assert str(CacheError("it failed")) == "it failed"


def test_survives_pickling_whole() -> None:
    error = errors.NoRoomError("full", hint="evict", reason="OTHER", needed_bytes=5)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.NoRoomError
    assert vars(again) == vars(error)


def test_the_daemons_error_comes_over_the_wire(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        with pytest.raises(cached_client.NotFoundError) as caught:
            cache.attach("nobody")
        assert caught.value.reason == "NOT_FOUND"
        assert caught.value.hint == "add it"
        assert caught.value.fields == {"ref": "nobody"}
        with pytest.raises(cached_client.NotFoundError):
            list(cache.pull("nobody"))


class Refusal(grpc.RpcError, grpc.Call):
    """An ended call with a status and no details."""

    def __init__(self, code, trailing=()):
        self._code, self._trailing = code, trailing

    def code(self):
        return self._code

    def details(self):
        return "said the transport"

    def trailing_metadata(self):
        return self._trailing

    def initial_metadata(self):
        return ()

    def is_active(self):
        return False

    def time_remaining(self):
        return None

    def cancel(self):
        return False

    def add_callback(self, callback):
        return False


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.DaemonUnavailableError),
        (grpc.StatusCode.CANCELLED, errors.DaemonUnavailableError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.LimitExceededError),
        (grpc.StatusCode.PERMISSION_DENIED, errors.PermissionDeniedError),
        (grpc.StatusCode.DATA_LOSS, errors.IntegrityError),
        (grpc.StatusCode.UNIMPLEMENTED, CacheError),
    ],
)
@pytest.mark.parametrize("trailing", [(), (("grpc-status-details-bin", b"\xff\xff"),), (("x", "y"),)])
def test_without_details_the_status_decides(code, kind, trailing) -> None:
    error = from_rpc_error(Refusal(code, trailing), "/run/x.sock")
    assert type(error) is kind
    assert "said the transport" in error.message


def test_a_deadline_that_passed_says_that_the_work_goes_on() -> None:
    error = from_rpc_error(Refusal(grpc.StatusCode.DEADLINE_EXCEEDED, ()), "/run/x.sock")
    assert type(error) is errors.TimeoutExpiredError
    assert str(error).startswith("no answer within the time limit")
    assert "cached ls" in error.hint


def test_a_missing_daemon_is_named_with_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "cached.sock"
    with Connection(str(path)) as connection, pytest.raises(errors.DaemonUnavailableError) as caught:
        connection.wait_ready(0.0)
    assert str(path) in str(caught.value)
    assert "systemctl status cached" in str(caught.value)
    assert "cached serve" in str(caught.value)
    assert caught.value.fields == {"target": str(path)}


def test_importing_the_package_is_light() -> None:
    code = (
        "import sys, cached_client\n"
        "heavy = {'grpc', 'google', 'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy\n"
        "cached_client.connect, cached_client.Model\n"
        "heavy = {'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_all_that_is_promised_is_there() -> None:
    for name in cached_client.__all__:
        assert getattr(cached_client, name) is not None
    with pytest.raises(AttributeError):
        _ = cached_client.nothing
