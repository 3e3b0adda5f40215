"""Checks of where memory, processors and GPUs lie, and of the clock."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached.cli.doctor.checks import Context, Finding, advice, ok, unseen
from cached.cli.doctor.gpu import gpus
from cached.cli.measure.facts import mount_of, number, read
from cached.units import GIB, format_size
from cached_client.gpu.topology import parse_cpulist

_ONE_SIDED = 0.8
_UNSYNCHRONISED = 0x0040
_FAR_OFF_S = 1.0


@dataclass(frozen=True, slots=True)
class Node:
    """A NUMA node."""

    number: int
    processors: int
    memory_bytes: int
    shmem_bytes: int


def nodes(context: Context) -> list[Node]:
    """Those with memory."""
    found = []
    for folder in sorted((context.sys / "devices/system/node").glob("node[0-9]*"), key=_number_of):
        sizes = re.findall(r"(\w+):\s+(\d+) kB", read(folder / "meminfo"))
        memory = {name: int(kib) * 1024 for name, kib in sizes}
        if memory.get("MemTotal"):
            found.append(
                Node(
                    _number_of(folder),
                    len(parse_cpulist(read(folder / "cpulist"))),
                    memory["MemTotal"],
                    memory.get("Shmem", 0),
                )
            )
    return found


def _number_of(folder: Path) -> int:
    return int(folder.name.removeprefix("node"))


def numa(context: Context) -> Iterator[Finding]:
    """Over which nodes shared memory is spread, and whether the kernel moves it about."""
    found = nodes(context)
    if len(found) < 2:
        yield ok("one NUMA node" if found else "NUMA is not shown here")
        return
    near = sorted({item.node for item in gpus(context.proc, context.sys) if item.node is not None})
    shmem_bytes = sum(node.shmem_bytes for node in found)
    measured = {f"node{node.number}_shmem_bytes": float(node.shmem_bytes) for node in found}
    shown = "; ".join(
        f"node {node.number}: {node.processors} processors, {format_size(node.memory_bytes)}, "
        f"{format_size(node.shmem_bytes)} shared"
        for node in found
    )
    told = f"{len(found)} nodes, GPUs on {', '.join(map(str, near)) or 'none that is told'}; {shown}"
    mount = mount_of(context.shm, context.proc)
    policy = mount.option("mpol") if mount is not None else ""
    most = max(found, key=lambda node: node.shmem_bytes)
    if shmem_bytes > GIB and most.shmem_bytes > _ONE_SIDED * shmem_bytes and not policy:
        told += f". Most of it lies on node {most.number}: GPUs of other nodes read it through the link between them"
        yield advice(told, f"mount -o remount,mpol=interleave {context.shm}   (for what comes from now on)", **measured)
    else:
        yield ok(told + (f"; {context.shm} has mpol={policy}" if policy else ""), **measured)
    if number(context.proc / "sys/kernel/numa_balancing"):
        told = "the kernel moves pages to where they are read (numa_balancing): it unmaps what copies to GPUs read"
        yield advice(told, "sysctl -w kernel.numa_balancing=0")


class _Timex(ctypes.Structure):
    """struct timex, as far as it is read. adjtimex(2)."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 512),
    )


@dataclass(frozen=True, slots=True)
class ClockState:
    """What the kernel thinks of its clock. ``error_s``: how far off it may be at most."""

    synchronised: bool
    error_s: float


def clock_state() -> ClockState:
    """Asks the kernel, and changes nothing. Raises OSError."""
    found = _Timex()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.adjtimex(ctypes.byref(found)) < 0:
        raise OSError(ctypes.get_errno(), "adjtimex")
    return ClockState(not found.status & _UNSYNCHRONISED, found.maxerror / 1e6)


def clock(context: Context) -> Iterator[Finding]:
    """Whether something keeps the clock right. How far it is from an origin's is told with that origin."""
    try:
        state = clock_state()
    except OSError as error:
        yield unseen(f"the kernel does not tell of its clock: {error.strerror}")
        return
    service = (context.tool(["timedatectl", "show", "-p", "NTP", "--value"]) or "").strip()
    if state.synchronised and state.error_s < _FAR_OFF_S:
        yield ok(f"synchronised, at most {1000 * state.error_s:.0f} ms off", error_s=state.error_s)
    elif state.synchronised:
        yield advice(f"synchronised, but maybe {state.error_s:.0f} s off", "chronyc tracking", error_s=state.error_s)
    elif service == "yes":
        yield advice("a time service runs, and has not synchronised the clock", "timedatectl timesync-status")
    else:
        told = "nothing keeps the clock right: S3 refuses requests that are more than 15 minutes off"
        yield advice(told, "timedatectl set-ntp true   (in a virtual machine or container: on its host)")
