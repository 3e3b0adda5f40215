"""The addresses behind a host name, so that connections use all of them and avoid those that failed."""

from __future__ import annotations

import itertools
import random
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_REFRESH_S = 45.0
_AVOID_S = 30.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where to connect to, as ``socket.getaddrinfo`` says it."""

    family: int
    sockaddr: tuple[Any, ...]


Resolve = Callable[[str, int], list[Address]]
"""The addresses of a host name and port. Raises socket.gaierror."""


def resolve(host: str, port: int) -> list[Address]:
    """What the system's resolver answers, in its order, each address once."""
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(Address(family, sockaddr) for family, _, _, _, sockaddr in found))


@dataclass(slots=True)
class _Host:
    addresses: list[Address]
    until_s: float
    # Processes that start together must not all begin with the same address.
    turns: itertools.count[int] = field(default_factory=lambda: itertools.count(random.randrange(1 << 16)))  # noqa: S311


class Addresses:
    """Addresses in the order in which a new connection should try them: in turn, those that failed lately last.

    Names are resolved again after 45 s, by whoever connects next; if that fails, the last answer stays in use.
    Thread-safe.
    """

    def __init__(self, resolve: Resolve = resolve, now_s: Callable[[], float] = time.monotonic) -> None:
        self._resolve = resolve
        self._now_s = now_s
        self._lock = threading.Lock()
        self._hosts: dict[tuple[str, int], _Host] = {}
        self._failed_s: dict[Address, float] = {}

    def next(self, host: str, port: int) -> list[Address]:
        """For one new connection. Blocks while the name is resolved; raises socket.gaierror."""
        found = self._current(host, port)
        with self._lock:
            first = next(found.turns) % len(found.addresses)
            turned = found.addresses[first:] + found.addresses[:first]
            oldest_s = self._now_s() - _AVOID_S
            self._failed_s = {address: at_s for address, at_s in self._failed_s.items() if at_s > oldest_s}
            return sorted(turned, key=lambda address: address in self._failed_s)

    def failed(self, address: Address) -> None:
        """A connection to it could not be made, or stalled."""
        with self._lock:
            self._failed_s[address] = self._now_s()

    def _current(self, host: str, port: int) -> _Host:
        key = (host, port)
        with self._lock:
            known = self._hosts.get(key)
            if known is not None and self._now_s() < known.until_s:
                return known
        try:
            addresses = self._resolve(host, port)
        except socket.gaierror:
            if known is None:
                raise
            addresses = known.addresses
        with self._lock:
            known = self._hosts.setdefault(key, _Host(addresses, 0.0))
            known.addresses = addresses
            known.until_s = self._now_s() + _REFRESH_S
            return known
