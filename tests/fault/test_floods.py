"""Floods: each user has a share of calls, streams, leases and connections, and nobody else notices who is beyond it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import grpc
import pytest

from cached_client import LimitExceededError
from cached_client._proto import cached_pb2 as pb
from cached_client.errors import from_rpc_error
from tests.integration.harness import DaemonProcess, wait_for
from tests.integration.support import Worker
from tests.integration.users import ANN, BEN, Open, needs_root, shared_daemon

pytestmark = needs_root

Host = tuple[DaemonProcess, Open]
LIMITS = {
    "connections_per_uid": 8,
    "calls_per_uid": 12,
    "leases_per_uid": 6,
    "streams_per_uid": 4,
    "descriptor_connections_per_uid": 5,
}


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with shared_daemon({"open": {}}, settings={"limits": LIMITS}) as made:
        yield made


@pytest.fixture(scope="module")
def ann(host: Host) -> Worker:
    """Who wants too much."""
    return host[1](ANN)


@pytest.fixture(scope="module")
def ben(host: Host) -> Worker:
    """Who wants what anybody does."""
    return host[1](BEN)


@pytest.fixture
def flooder(host: Host, ann: Worker, ben: Worker) -> Iterator[Worker]:
    """Ann. Ben is served while she has too much, and she is once she has let go."""
    daemon, _ = host
    yield ann
    assert ben.ask("attach", ref="open")
    assert ben.ask("health") == "SERVING"
    ben.ask("release")
    ann.ask("disconnect")
    wait_for(lambda: ann.ask("call", method="List")["code"] == "OK", "Ann to be served again")
    wait_for(lambda: not daemon.stats().lease_count, "all leases to be gone")


def check_told(refused: list[str], what: str, allowed: int) -> None:
    assert refused
    assert set(refused) == {f"RESOURCE_EXHAUSTED: uid {ANN} has {allowed} {what}, and may have no more"}


def test_leases_have_a_limit(flooder: Worker) -> None:
    answer = flooder.ask("open_streams", method="Attach", count=9, ref="open")
    assert answer["open"] == LIMITS["leases_per_uid"]
    check_told(answer["refused"], "leases", LIMITS["leases_per_uid"])
    assert flooder.ask("health") == "SERVING"


def test_other_streams_have_one_of_their_own(flooder: Worker) -> None:
    assert flooder.ask("open_streams", method="Attach", count=5, ref="open")["open"] == 5
    answer = flooder.ask("open_streams", method="Watch", count=7, replay=True)
    assert answer["open"] == LIMITS["streams_per_uid"]
    check_told(answer["refused"], "streams", LIMITS["streams_per_uid"])


def test_calls_have_one_in_all(flooder: Worker) -> None:
    # Leases and streams are calls, too, and so there is no more than one left for anything else.
    assert flooder.ask("open_streams", method="Attach", count=6, ref="open")["open"] == 6
    assert flooder.ask("open_streams", method="Watch", count=4, replay=True)["open"] == 4
    assert flooder.ask("call", method="List")["code"] == "OK"
    codes = flooder.ask("flood", calls=200, width=6)
    assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert codes["OK"]


def test_connections_have_a_limit_and_who_is_beyond_it_is_told(flooder: Worker) -> None:
    answers = flooder.ask("connect", count=LIMITS["connections_per_uid"] + 3)
    served = [answer for answer in answers if answer == "OK"]
    assert 0 < len(served) <= LIMITS["connections_per_uid"]
    check_told([answer for answer in answers if answer != "OK"], "connections", LIMITS["connections_per_uid"])


def test_descriptors_cannot_be_hoarded(flooder: Worker) -> None:
    assert flooder.ask("hoard", count=20) == LIMITS["descriptor_connections_per_uid"]


def test_the_error_names_limit_setting_and_user(host: Host, flooder: Worker) -> None:
    assert flooder.ask("open_streams", method="Watch", count=4, replay=True)["open"] == 4
    answer = flooder.ask("call", method="Watch")
    details = bytes.fromhex(answer["grpc-status-details-bin"])
    for word in ("LIMIT_EXCEEDED", "limits.streams_per_uid", f"uid {ANN}", "streams"):
        assert word.encode() in details


def test_a_message_beyond_the_limit_says_so(host: Host, flooder: Worker) -> None:
    with host[0].stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Describe(pb.DescribeRequest(ref="m" * (4 << 20)))
    error = from_rpc_error(caught.value, "")
    assert isinstance(error, LimitExceededError)
    assert "larger than max" in error.message


@pytest.mark.faults
def test_a_flood_of_minutes_keeps_nobody_waiting_for_ever_and_leaves_nothing(host: Host) -> None:
    """Four users at once, each as fast as it can, over more connections than it may have."""
    daemon, as_user = host
    ben = as_user(BEN)
    flooders = [as_user(ANN + 10 + number) for number in range(4)]
    for flooder in flooders:
        flooder.send("flood", calls=20_000, width=12)
    checks = 0
    left = list(flooders)
    until_s = time.monotonic() + 600
    while left and time.monotonic() < until_s:
        assert ben.ask("health") == "SERVING"
        assert ben.ask("call", method="List")["code"] == "OK"
        checks += 1
        if checks % 20 == 0:
            codes = left.pop().receive()
            assert set(codes) <= {"OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}
            assert sum(codes.values()) == 20_000
    assert checks
    assert not left
    wait_for(lambda: not daemon.stats().lease_count, "nothing to be left")
