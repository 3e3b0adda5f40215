"""Checks of the host: the daemon, its sockets, and the memory that L1 is made of."""

from __future__ import annotations

import getpass
import grp
import os
import stat
import statistics
import time
from collections.abc import Iterator

from cached.cache.capacity import l1_budget
from cached.cli.connect import connected
from cached.cli.doctor.checks import Context, Finding, Verdict
from cached.cli.doctor.child import run_child
from cached.config import load_config
from cached.levels.shm import huge_pages_allowed
from cached.rpc.sockets import descriptor_socket_path
from cached.units import GIB, MIB, format_size
from cached_client._proto import cached_pb2 as pb
from cached_client.errors import CacheError

_CALLS = 5
_TIMEOUT_S = 5.0
_FILL_BYTES = 128 * MIB


def daemon(context: Context) -> Iterator[Finding]:
    """Whether it answers, how fast, and whether all is well with it."""
    times_ms: list[float] = []
    with connected(context.options) as cache:
        try:
            for _ in range(_CALLS):
                began_s = time.perf_counter()
                stats = cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_TIMEOUT_S)
                times_ms.append(1000 * (time.perf_counter() - began_s))
        except CacheError as error:
            yield Finding(Verdict.PROBLEM, error.message, mend=error.hint)
            return
    measured = {"call_ms": statistics.median(times_ms)}
    for reason in stats.degraded:
        yield Finding(Verdict.PROBLEM, f"the daemon is degraded: {reason}", measured, "cached health")
    if not stats.degraded:
        yield Finding(
            Verdict.OK, f"version {stats.version} answers on {context.socket} in {measured['call_ms']:.1f} ms", measured
        )


def sockets(context: Context) -> Iterator[Finding]:
    """Whether this user may use both of them, and nobody who should not."""
    for path in (context.socket, descriptor_socket_path(context.socket)):
        try:
            found = os.stat(path)
        except OSError as error:
            yield Finding(Verdict.PROBLEM, f"{path}: {error.strerror}", mend="systemctl start cached")
            continue
        mode, group = f"{stat.S_IMODE(found.st_mode):04o}", _group(found.st_gid)
        if not stat.S_ISSOCK(found.st_mode):
            yield Finding(Verdict.PROBLEM, f"{path} is not a socket", mend=f"rm {path} && systemctl restart cached")
        elif not os.access(path, os.R_OK | os.W_OK):
            told = f"{path} has mode {mode} and group {group}: {getpass.getuser()} may not use it"
            yield Finding(Verdict.PROBLEM, told, mend=f"usermod -aG {group} {getpass.getuser()}")
        elif found.st_mode & stat.S_IWOTH:
            told = f"{path} has mode {mode}: every user of this host may use it"
            yield Finding(Verdict.ADVICE, told, mend='access.socket_mode = "0660"')
        else:
            yield Finding(Verdict.OK, f"{path} has mode {mode} and group {group}")


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def shared_memory(context: Context) -> Iterator[Finding]:
    """Whether the mount has room for what L1 is configured to take, and what limits it now."""
    budget = l1_budget(load_config(None, context.environment, {}).config.l1.capacity)
    place = os.statvfs(context.shm)
    total_bytes = place.f_blocks * place.f_frsize
    measured = {"mount_bytes": float(total_bytes), "budget_bytes": float(budget.size_bytes)}
    sizes = f"{context.shm} is {format_size(total_bytes)}, L1 is {budget.because} ({format_size(budget.size_bytes)})"
    if total_bytes < budget.size_bytes:
        size = f"{-(-budget.size_bytes // GIB)}G"
        yield Finding(Verdict.ADVICE, sizes, measured, f"mount -o remount,size={size} {context.shm}")
    else:
        yield Finding(Verdict.OK, sizes, measured)
    with connected(context.options) as cache:
        levels = cache.call(cache.stub.Stats, pb.StatsRequest(), timeout_s=_TIMEOUT_S).levels
    for level in levels:
        if level.level == pb.LEVEL_L1 and not level.limited_by.startswith("configured"):
            told = f"L1 has {format_size(level.capacity_bytes)} now, less than configured: {level.limited_by}"
            yield Finding(Verdict.ADVICE, told, {"capacity_bytes": float(level.capacity_bytes)}, "cached stats")


_FILL = """
import ctypes, json, mmap, os, sys, tempfile, time
folder, size = sys.argv[1], int(sys.argv[2])
fd, path = tempfile.mkstemp(prefix="doctor-", dir=folder)
os.unlink(path)
os.ftruncate(fd, size)
view = mmap.mmap(fd, size)
view.madvise(mmap.MADV_HUGEPAGE)
address = ctypes.addressof(ctypes.c_char.from_buffer(view))
times = []
for _ in range(4):
    began = time.perf_counter()
    ctypes.memset(address, 1, size)
    times.append(time.perf_counter() - began)
smaps = open("/proc/self/smaps").read().split(f"{address:x}-", 1)[1]
huge = next(int(line.split()[1]) * 1024 for line in smaps.splitlines() if line.startswith("ShmemPmdMapped:"))
print(json.dumps({"fresh_s": times[0], "again_s": min(times[1:]), "huge_bytes": huge}))
"""


def huge_pages(context: Context) -> Iterator[Finding]:
    """Fills fresh shared memory as a load does, and the same memory again."""
    place = os.statvfs(context.shm)
    if place.f_bavail * place.f_frsize < 2 * _FILL_BYTES:
        yield Finding(Verdict.NOT_MEASURED, f"{context.shm} has too little room left to measure in")
        return
    found = run_child(context, _FILL, (str(context.shm), str(_FILL_BYTES)))
    measured = {
        "fresh_gb_per_s": _FILL_BYTES / 1e9 / found["fresh_s"],
        "again_gb_per_s": _FILL_BYTES / 1e9 / found["again_s"],
        "huge_page_share": found["huge_bytes"] / _FILL_BYTES,
    }
    speeds = (
        f"{measured['fresh_gb_per_s']:.1f} GB/s into fresh memory, {measured['again_gb_per_s']:.1f} into the same again"
    )
    if found["huge_bytes"] >= _FILL_BYTES // 2:
        yield Finding(Verdict.OK, f"{context.shm} gives huge pages: {speeds}", measured)
        return
    allowed = huge_pages_allowed((context.proc / "self/mounts").read_text())
    why = "gave none, though its mount allows them" if allowed else "gives no huge pages"
    mend = "echo 1 > /proc/sys/vm/compact_memory" if allowed else f"mount -o remount,huge=advise {context.shm}"
    told = f"{context.shm} {why}: {speeds}. What huge pages would give cannot be measured without them"
    yield Finding(Verdict.ADVICE, told, measured, mend)
