"""Connections over all addresses of a host name: in turn, around those that fail, and ended from another thread."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3
import urllib3.exceptions

from cached.origins.base import Abort
from cached.origins.net.addresses import Address, Addresses, resolve
from cached.origins.net.connections import interruptible, pool_classes
from tests.servers import make_certificate

NAME = "store.example"
DEADLINE_S = 30


def address(number: int, port: int = 443) -> Address:
    return Address(socket.AF_INET, (f"127.0.0.{number}", port))


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


class Names:
    """A resolver that counts; ``answer`` may be changed, None is a failure."""

    def __init__(self, *answer: Address) -> None:
        self.answer: list[Address] | None = list(answer)
        self.asked = 0

    def __call__(self, host: str, port: int) -> list[Address]:
        self.asked += 1
        if self.answer is None:
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        assert host == NAME
        return self.answer


def test_addresses_take_turns_and_names_are_asked_seldom() -> None:
    clock, names = Clock(), Names(address(1), address(2), address(3))
    addresses = Addresses(names, clock)
    orders = [addresses.next(NAME, 443) for _ in range(6)]
    assert Counter(order[0] for order in orders) == dict.fromkeys(names.answer or (), 2)
    assert all(set(order) == {address(1), address(2), address(3)} for order in orders)
    assert names.asked == 1
    clock.now_s += 60
    names.answer = [address(4)]
    assert addresses.next(NAME, 443) == [address(4)]


def test_an_address_that_failed_comes_last_for_a_while() -> None:
    clock = Clock()
    addresses = Addresses(Names(address(1), address(2)), clock)
    addresses.failed(address(1))
    assert [addresses.next(NAME, 443) for _ in range(4)] == [[address(2), address(1)]] * 4
    addresses.failed(address(2))
    assert {addresses.next(NAME, 443)[0] for _ in range(4)} == {address(1), address(2)}, "all failed: all alike"
    clock.now_s += 31
    assert {addresses.next(NAME, 443)[0] for _ in range(4)} == {address(1), address(2)}


def test_a_resolver_that_fails_leaves_the_last_answer() -> None:
    clock, names = Clock(), Names(address(1))
    addresses = Addresses(names, clock)
    addresses.next(NAME, 443)
    names.answer = None
    clock.now_s += 60
    assert addresses.next(NAME, 443) == [address(1)]
    with pytest.raises(socket.gaierror):
        Addresses(names, clock).next(NAME, 443)


def test_the_system_resolves_numbers_of_both_families() -> None:
    assert resolve("127.0.0.1", 80) == [Address(socket.AF_INET, ("127.0.0.1", 80))]
    assert resolve("[::1]", 80)[0].family == socket.AF_INET6


class Server(ThreadingHTTPServer):
    """Answers with the address that it was reached by, and the Host that it was asked for. /stall never ends."""

    daemon_threads = True

    def __init__(self, number: int, port: int = 0, context: ssl.SSLContext | None = None) -> None:
        super().__init__((f"127.0.0.{number}", port), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.stalled = threading.Event()
        self.done = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that refuses the certificate is nothing to report."""

    def end(self) -> None:
        self.done.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        body = f"{self.connection.getsockname()[0]} {self.headers['Host']}".encode()
        self.send_response_only(200)
        self.send_header("Content-Length", str(len(body)))
        if self.headers["Connection"] == "close":
            self.send_header("Connection", "close")
        self.end_headers()
        if "stall" in self.path:
            self.server.stalled.set()
            self.server.done.wait(DEADLINE_S)
        with contextlib.suppress(OSError):
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    first = Server(1)
    made = [first, Server(2, first.server_port), Server(3, first.server_port)]
    try:
        yield made
    finally:
        for server in made:
            server.end()


@contextlib.contextmanager
def manager_of(addresses: Addresses, **options: Any) -> Iterator[urllib3.PoolManager]:
    manager = urllib3.PoolManager(retries=False, timeout=5.0, **options)
    manager.pool_classes_by_scheme = pool_classes(addresses)
    try:
        yield manager
    finally:
        manager.clear()


def reached(manager: urllib3.PoolManager, port: int, count: int) -> Counter[str]:
    """Which addresses answered so many requests, each on a connection of its own."""
    found: Counter[str] = Counter()
    for _ in range(count):
        answer = manager.request("GET", f"http://{NAME}:{port}/", headers={"Connection": "close"})
        where, host = answer.data.decode().split()
        assert host == f"{NAME}:{port}", "the server hears the name"
        found[where] += 1
    return found


def test_new_connections_go_to_every_address(servers: list[Server]) -> None:
    port = servers[0].server_port
    names = Names(*(address(number, port) for number in (1, 2, 3)))
    with manager_of(Addresses(names)) as manager:
        assert reached(manager, port, 9) == {"127.0.0.1": 3, "127.0.0.2": 3, "127.0.0.3": 3}


def test_a_dead_address_costs_one_attempt(servers: list[Server]) -> None:
    port = servers[0].server_port
    servers[1].end()
    names = Names(*(address(number, port) for number in (1, 2, 3)))
    with manager_of(Addresses(names)) as manager:
        found = reached(manager, port, 12)
        assert set(found) == {"127.0.0.1", "127.0.0.3"}


def test_no_address_that_answers_is_an_error_of_urllib3() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and not listening
        port = bound.getsockname()[1]
        with (
            manager_of(Addresses(Names(address(1, port)))) as manager,
            pytest.raises(urllib3.exceptions.NewConnectionError),
        ):
            manager.request("GET", f"http://{NAME}:{port}/")
    names = Names()
    names.answer = None
    with manager_of(Addresses(names)) as manager, pytest.raises(urllib3.exceptions.NameResolutionError):
        manager.request("GET", f"http://{NAME}:1/")


def test_certificates_are_checked_for_the_name(tmp_path: Path) -> None:
    certificate, key = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(2, context=context)
    port = server.server_port
    try:
        addresses = Addresses(lambda _host, _port: [address(2, port)])
        with manager_of(addresses, ca_certs=str(certificate)) as manager:
            answer = manager.request("GET", f"https://localhost:{port}/")
            assert answer.data.decode() == f"127.0.0.2 localhost:{port}"
            with pytest.raises(urllib3.exceptions.SSLError, match=NAME.replace(".", r"\.")):
                manager.request("GET", f"https://{NAME}:{port}/")
    finally:
        server.end()


@pytest.mark.parametrize("reused", [False, True])
def test_a_read_that_waits_is_ended_and_its_address_avoided(servers: list[Server], *, reused: bool) -> None:
    port = servers[0].server_port
    addresses = Addresses(Names(address(1, port), address(2, port)))
    abort, failures = Abort(), []

    def read(manager: urllib3.PoolManager) -> None:
        try:
            with interruptible(abort):
                answer = manager.request("GET", f"http://{NAME}:{port}/stall", preload_content=False)
                failures.append(answer.data)
        except urllib3.exceptions.HTTPError as error:
            failures.append(error)

    with manager_of(addresses) as manager:
        if reused:
            manager.request("GET", f"http://{NAME}:{port}/")
        thread = threading.Thread(target=read, args=(manager,))
        thread.start()
        stalled: list[Server] = []
        for _ in range(int(DEADLINE_S / 0.01)):
            stalled = [server for server in servers if server.stalled.wait(0.005)]
            if stalled:
                break
        abort.abort()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert isinstance(failures[0], urllib3.exceptions.HTTPError)
        avoided = stalled[0].server_address[0]
        assert addresses.next(NAME, port)[-1].sockaddr[0] == avoided
        with interruptible(abort), pytest.raises(urllib3.exceptions.HTTPError):
            manager.request("GET", f"http://{NAME}:{port}/", headers={"Connection": "close"})
        assert sum(reached(manager, port, 3).values()) == 3, "later reads are not concerned"
