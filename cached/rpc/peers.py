"""Who is at the other end of a Unix socket: what the kernel proves of it, and what /proc tells of its process."""

from __future__ import annotations

import re
import socket
import struct
from contextlib import suppress

from cached.types import Peer

_CREDENTIALS = struct.Struct("3i")
_ID = re.compile(r"[0-9a-f]{64}")
_POD = re.compile(r"pod([0-9a-f]{8})[0-9a-f_-]{24,28}")
_UNIT = re.compile(r"([\w@.:-]+\.service)")
_LIMIT = 64
_SO_PEERGROUPS = 59


def peer_of(connection: socket.socket) -> Peer:
    """The peer's credentials when it connected (SO_PEERCRED), and what its process is called.

    The pid is 0, and nothing else is known, where the process is in a PID namespace that the daemon does not see.
    """
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return Peer(pid, uid, gid, _read(pid, "comm").strip()[:_LIMIT], container_of(_read(pid, "cgroup")))


def groups_of(connection: socket.socket) -> tuple[int, ...]:
    """The peer's supplementary groups when it connected; none where the kernel does not tell."""
    for size in (1024, 4 * 65536):
        with suppress(OSError):
            data = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, size)
            return struct.unpack(f"{len(data) // 4}I", data[: len(data) // 4 * 4])
    return ()


def _read(pid: int, name: str) -> str:
    """Of a process that is gone, or that we may not see: nothing."""
    if pid > 0:
        with suppress(OSError), open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as file:
            return file.read(4096)
    return ""


def container_of(cgroup: str) -> str:
    """What a process's control groups tell of where it runs: ``pod 1c7f9e0b``, ``container 4f0c…`` or ``x.service``.

    Pods and containers by the names that the kubelet, containerd, CRI-O, Docker and Podman give their groups. Of a
    pod the first digits of its UID, of a container those of its id.
    """
    if found := _POD.search(cgroup):
        return f"pod {found[1]}"
    if found := _ID.search(cgroup):
        return f"container {found[0][:12]}"
    names = _UNIT.findall(cgroup)
    return names[-1][:_LIMIT] if names else ""
