"""The link of limited bandwidth: what goes through it is not changed."""

from __future__ import annotations

import socket
import threading

from bench.link import Link
from tests.integration.support import random_bytes


def test_bytes_pass_unchanged_both_ways_on_several_connections():
    data = random_bytes(3_000_000, 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_echo, args=(server, 3), daemon=True).start()
        with Link(f"http://127.0.0.1:{server.getsockname()[1]}", 1e9) as link:
            port = int(link.url.rpartition(":")[2])
            for _ in range(3):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    sender = threading.Thread(target=_send, args=(connection, data))
                    sender.start()
                    received = bytearray()
                    while len(received) < len(data):
                        received += connection.recv(1 << 20)
                    sender.join()
                    assert received == data


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)


def _echo(server: socket.socket, count: int) -> None:
    for _ in range(count):
        connection = server.accept()[0]
        with connection:
            while data := connection.recv(1 << 16):
                connection.sendall(data)
