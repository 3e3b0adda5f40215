"""Clients that mean harm, or do not know better: only they are the worse for it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import grpc
import pytest

from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused, sha256


@pytest.fixture
def served(site: Site) -> Iterator[Site]:
    """A worker holds a model, and has what it had afterwards."""
    files = site.add("m", model_files(2 * MB))
    site.start()
    worker = site.worker()
    worker.ask("attach", ref="m")
    yield site
    assert len(site.leases()) == 1
    assert worker.ask("digests") == {path: sha256(data) for path, data in files.items()}
    worker.ask("detach")


@pytest.mark.parametrize(
    "data", [b"\x00" * 4096, b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 512]
)
def test_garbage_at_the_socket_of_calls_ends_its_own_connection(served: Site, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(served.daemon.socket))
        client.sendall(data)
        try:
            while client.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass
    served.daemon.stats()


def test_connections_that_say_nothing_keep_nobody_out(served: Site) -> None:
    with ExitStack() as stack:
        for _ in range(200):
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(served.daemon.socket))
        served.check_served("m")


def test_a_message_beyond_the_limit_is_refused(served: Site) -> None:
    with served.daemon.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Describe(pb.DescribeRequest(ref="m" * (64 << 20)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_lease_that_is_not_there_cannot_be_given_back(served: Site) -> None:
    with refused("NOT_FOUND"), served.rpc() as stub:
        stub.Detach(pb.DetachRequest(lease_id="00000000"))


def test_a_lease_is_given_back_once(served: Site) -> None:
    """The second time it is not there: nobody else's count goes down."""
    with served.rpc() as stub:
        stream = stub.Attach(pb.AttachRequest(ref="m"))
        mine = next(stream).opened
        assert len(served.leases()) == 2
        given = pb.DetachRequest(lease_id=mine.lease_id, token=mine.token)
        stub.Detach(given)
        wait_for(lambda: len(served.leases()) == 1, "the worker's lease alone")
        for _ in range(3):
            with refused("NOT_FOUND"), served.rpc() as again:
                again.Detach(given)
        stream.cancel()
    with refused("IN_USE"):
        served.evict("m")


def test_another_ones_lease_cannot_be_given_back(served: Site) -> None:
    (lease,) = served.leases()
    for token in ("", "0" * 32, "x" * 1000):
        with refused("PERMISSION_DENIED"), served.rpc() as stub:
            stub.Detach(pb.DetachRequest(lease_id=lease.lease_id, token=token))


def test_a_flood_of_calls_is_answered_and_the_daemon_stays_what_it_was(served: Site) -> None:
    with ThreadPoolExecutor(16) as pool, served.daemon.stub() as stub:
        answers = list(pool.map(lambda _: stub.List(pb.ListRequest()), range(1000)))
        assert {len(answer.models) for answer in answers} == {1}
    wait_for(lambda: len(served.leases()) == 1, "the lease of the worker alone")
