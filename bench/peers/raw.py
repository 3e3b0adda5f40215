"""The limit: plain sockets, presigned GETs of ranges, ``recv_into`` a recycled mapping of tmpfs. Checks nothing."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import ssl
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from bench.peers.fingerprint import tensors_of
from bench.peers.protocol import Order, serve

_READ_BYTES = 1 << 20


class Raw:
    """Order: ``objects`` ([URL, size]…), ``folder`` (on tmpfs), ``threads``, ``range_bytes``, ``ca_bundle``, ``fresh``.

    ``fresh``: each load has mappings without pages, as whoever has no memory yet.
    """

    packages = ()

    def __init__(self, order: Order) -> None:
        self._order = order
        self._context = ssl.create_default_context(cafile=order["ca_bundle"]) if order.get("ca_bundle") else None
        self._targets = self._mappings()

    def warm_up(self) -> None:
        """Its memory is touched, as that of a pool is; the load's own connections are made in the load."""
        for target in () if self._order["fresh"] else self._targets:
            for offset in range(0, len(target), mmap.PAGESIZE):
                target[offset] = 1

    def load(self) -> list[memoryview]:
        step = self._order["range_bytes"]
        jobs = [
            (url, target[start : start + step], start)
            for (url, _), target in zip(self._order["objects"], self._targets, strict=True)
            for start in range(0, len(target), step)
        ]
        lanes = [jobs[number :: self._order["threads"]] for number in range(self._order["threads"])]
        with ThreadPoolExecutor(len(lanes)) as pool:
            list(pool.map(self._read_lane, lanes))
        return self._targets

    def tensors(self, loaded: list[memoryview]) -> Iterable[tuple[str, memoryview]]:
        for file in loaded:
            yield from tensors_of(file)

    def clear(self) -> None:
        """The mappings are used again, but not their content; or they are made anew."""
        if self._order["fresh"]:
            self._targets = self._mappings()
            return
        for target in self._targets:
            ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(target)), 0, len(target))

    def _mappings(self) -> list[memoryview]:
        return [self._mapping(number, size) for number, (_, size) in enumerate(self._order["objects"])]

    def _mapping(self, number: int, size_bytes: int) -> memoryview:
        path = Path(self._order["folder"]) / f"raw-{number}"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            return memoryview(mmap.mmap(descriptor, size_bytes))
        finally:
            os.close(descriptor)

    def _read_lane(self, jobs: list[tuple[str, memoryview, int]]) -> None:
        if not jobs:
            return
        with self._connect(jobs[0][0]) as connection:
            for url, target, start in jobs:
                self._read_range(connection, url, target, start)

    def _connect(self, url: str) -> socket.socket:
        place = urlsplit(url)
        connection = socket.create_connection((place.hostname, place.port or 80))
        return self._context.wrap_socket(connection, server_hostname=place.hostname) if self._context else connection

    @staticmethod
    def _read_range(connection: socket.socket, url: str, target: memoryview, start: int) -> None:
        place = urlsplit(url)
        wanted = f"bytes={start}-{start + len(target) - 1}"
        request = f"GET {place.path}?{place.query} HTTP/1.1\r\nHost: {place.netloc}\r\nRange: {wanted}\r\n\r\n"
        connection.sendall(request.encode())
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(4096)
            if not data:
                raise ConnectionError("the server closed the connection")
            head += data
        head, _, first = head.partition(b"\r\n\r\n")
        if head.split()[1] not in {b"200", b"206"}:
            raise ConnectionError(head.splitlines()[0].decode())
        target[: len(first)] = first
        at = len(first)
        while at < len(target):
            count = connection.recv_into(target[at : at + _READ_BYTES])
            if not count:
                raise ConnectionError("the server closed the connection")
            at += count


if __name__ == "__main__":
    serve(Raw)
