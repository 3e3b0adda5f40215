"""Which daemons there are: what listens on sockets that are called as ours are, and what answers there."""

from __future__ import annotations

import os
import re
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached.cli.doctor.checks import Context
from cached.cli.measure.facts import read
from cached.rpc.sockets import descriptor_socket_path
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import Connection
from cached_client.errors import CacheError

TIMEOUT_S = 5.0
_CREDENTIALS = struct.Struct("3i")
_OTHERS_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Listener:
    """What is behind a socket. ``error``: why nobody is; then ``pid`` is None."""

    pid: int | None = None
    uid: int | None = None
    error: OSError | None = None


def listener(path: str) -> Listener:
    """Who listens on a Unix socket, by SO_PEERCRED: nothing is said to them. unix(7)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(TIMEOUT_S)
        try:
            probe.connect(path)
            found = probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        except OSError as error:
            return Listener(error=error)
    pid, uid, _ = _CREDENTIALS.unpack(found)
    return Listener(pid or None, uid)  # 0: a process of another namespace


def sockets_in_use(proc: Path) -> list[str]:
    """Paths of sockets that belong to daemons, by their names: each has its descriptor socket beside it."""
    bound = set()
    for line in read(proc / "net/unix").splitlines():
        match = re.search(r" (/.*\.sock)$", line)
        if match:
            bound.add(match[1])
    return sorted(path for path in bound if descriptor_socket_path(path) in bound)


def instances(context: Context) -> tuple[set[str], list[str]]:
    """The instances of the daemons that answer, and what is known of those that do not: their socket, or their pid."""
    alive: set[str] = set()
    silent: list[str] = []
    asked: set[int | None] = set()
    for path in sorted({*sockets_in_use(context.proc), os.path.realpath(context.socket)}):
        there = listener(path)
        if there.error is not None and not isinstance(there.error, PermissionError):
            continue  # left by one that is gone, or another network namespace's path
        asked.add(there.pid)
        try:
            with Connection(path) as cache:
                alive.add(cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_OTHERS_TIMEOUT_S).instance)
        except CacheError:
            silent.append(path)
    return alive, silent + [f"pid {pid}" for pid in sorted(_serving(context.proc)) if pid not in asked]


def _serving(proc: Path) -> Iterator[int]:
    """Processes that run ``cached serve``, those of containers below this one included."""
    for folder in proc.iterdir():
        if folder.name.isdecimal():
            before, serve, _ = read(folder / "cmdline").partition("\0serve")
            if serve and "cached" in before:
                yield int(folder.name)


def flags(pid: int | None, proc: Path = Path("/proc")) -> dict[str, str]:
    """What ``cached serve`` was told on its command line, as far as this user may see it: ``--config`` → its value."""
    if pid is None:
        return {}
    words = read(proc / str(pid) / "cmdline").split("\0")
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            found[name] = value if equals else following
    return found
