"""Checks of what bounds the daemon's process: cgroups, limits, swap, pressure, processors, and the kernel itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from cached.cache.build import auto_movers
from cached.cache.capacity import l1_budget, meminfo
from cached.cli.doctor.checks import Context, Finding, advice, ok, problem, unseen
from cached.cli.doctor.gpu import gpus
from cached.cli.doctor.memory import in_pod
from cached.cli.measure.facts import kernel_release, kernel_version, limits, mount_of, read, stalled_percent
from cached.units import GIB, MIB, format_size

HEAP_BYTES = 1 * GIB
"""Beside L1: the daemon with its movers and their buffers. 80 MB idle, and some 150 MB for each mover at work."""
_LEAST_FILES = 8192
_FEW_FILES = 1024
_LEAST_LOCKED_BYTES = 64 * MIB
_SHORT_PERCENT, _EASY_PERCENT = 5.0, 1.0
"""As in cache.capacity: from the first on, L1 gives memory back."""


def memory_cgroup(context: Context) -> Iterator[Finding]:
    """Whether the memory cgroups leave L1 its budget, and room for the daemon's own memory."""
    found = context.cgroups.memory()
    limited = [cgroup for cgroup in found if cgroup.limit_bytes is not None]
    budget_bytes = l1_budget(context.config.l1.capacity, context.proc).size_bytes
    charged = f", {format_size(found[0].shmem_bytes)} of shared memory is charged to it" if found else ""
    if not limited:
        yield ok(f"{context.whose} cgroup has no limit of memory{charged}")
    for cgroup in limited:
        limit_bytes, left_bytes = cgroup.limit_bytes or 0, cgroup.left_bytes or 0
        measured = {
            "limit_bytes": float(limit_bytes), "used_bytes": float(cgroup.used_bytes), "left_bytes": float(left_bytes),
            "shmem_bytes": float(cgroup.shmem_bytes), "budget_bytes": float(budget_bytes),
        }  # fmt: skip
        told = (
            f"{context.whose} cgroup {cgroup.folder} may have {format_size(limit_bytes)} and has "
            f"{format_size(cgroup.used_bytes)} ({format_size(cgroup.shmem_bytes)} of it shared memory); L1 wants "
            f"{format_size(budget_bytes)}"
        )
        mend = _more_memory(context, budget_bytes)
        if limit_bytes < budget_bytes:
            yield problem(f"{told}: it never gets that", mend, **measured)
        elif limit_bytes < budget_bytes + HEAP_BYTES:
            told += f", and the daemon beside it up to {format_size(HEAP_BYTES)}: the kernel may kill it"
            yield advice(told, mend, **measured)
        else:
            yield ok(told, **measured)
    for cgroup in found:
        if cgroup.high_bytes is not None and cgroup.high_bytes < budget_bytes + HEAP_BYTES:
            told = f"{cgroup.folder} is slowed down from {format_size(cgroup.high_bytes)} on (memory.high): below L1"
            yield advice(told, "MemoryHigh=infinity in the unit", high_bytes=float(cgroup.high_bytes))


def _more_memory(context: Context, budget_bytes: int) -> str:
    wanted_gib = -(-(budget_bytes + HEAP_BYTES) // GIB)
    if in_pod(context):
        return f"resources.limits.memory: {wanted_gib}Gi   (or a smaller l1.capacity)"
    return f"systemctl edit cached, [Service] MemoryMax={wanted_gib}G   (or a smaller l1.capacity)"


def swap(context: Context) -> Iterator[Finding]:
    """Whether L1 may be swapped out: then a warm start waits for a disk."""
    areas = read(context.proc / "swaps").splitlines()[1:]
    mount = mount_of(context.shm, context.proc)
    if not areas:
        yield ok("no swap")
    elif mount is not None and "noswap" in mount.options:
        yield ok(f"there is swap, and {context.shm} is mounted noswap")
    elif any(cgroup.swap_bytes == 0 for cgroup in context.cgroups.memory()):
        yield ok(f"there is swap, and {context.whose} cgroup may not use it")
    else:
        used_bytes = sum(int(fields[3]) * 1024 for line in areas if len(fields := line.split()) > 3)
        told = f"shared memory may be swapped out ({format_size(used_bytes)} of swap are in use): L1 would be on a disk"
        mend = "systemctl edit cached, [Service] MemorySwapMax=0   (shared memory is charged to who filled it)"
        yield advice(told, mend, swap_used_bytes=float(used_bytes))


def pressure(context: Context) -> Iterator[Finding]:
    """What tasks lost lately to a shortage of memory, disk or processors: pressure stall information."""
    found = {
        name: stalled_percent(context.proc / "pressure" / name, kind)
        for name, kind in (("memory", "full"), ("io", "full"), ("cpu", "some"))
    }
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        yield unseen("the kernel tells no pressure", "boot with psi=1")
        return
    shown = ", ".join(f"{name} {value:g} %" for name, value in known.items())
    measured = {f"{name}_percent": value for name, value in known.items()}
    told = f"of the last 10 s were lost to shortages: {shown}"
    stalled = known.get("memory", 0.0)
    if stalled >= _SHORT_PERCENT:
        yield problem(f"{told}. L1 gives memory back while that lasts", "ps aux --sort -rss | head", **measured)
    elif stalled > _EASY_PERCENT:
        yield advice(f"{told}. From {_SHORT_PERCENT:g} % of memory on L1 shrinks", "cached top", **measured)
    else:
        yield ok(told, **measured)


def processors_allowed(context: Context) -> float:
    """Those that the process may use: by its affinity, and by the quota of its cgroups."""
    quota = context.cgroups.processors()
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else min(allowed, quota)


def processors(context: Context) -> Iterator[Finding]:
    """Whether the movers have processors to run on."""
    quota = context.cgroups.processors()
    movers = context.config.transfer.movers or auto_movers()
    cores = len(os.sched_getaffinity(0))
    measured = {"processors": float(cores), "movers": float(movers)}
    if quota is None:
        yield ok(f"{cores} processors without a quota, {movers} movers", **measured)
        return
    measured["quota"] = quota
    told = f"{context.whose} cgroup may keep {quota:g} of {cores} processors busy, and there are {movers} movers"
    if quota < movers:
        told += ": they are stopped again and again, and what the quota stops answers late"
        mend = "resources: leave limits.cpu out, and request what is needed" if in_pod(context) else "CPUQuota= (none)"
        yield advice(told, f"{mend}   (or transfer.movers = {max(1, math.floor(quota))})", **measured)
    else:
        yield ok(told, **measured)


def process_limits(context: Context) -> Iterator[Finding]:
    """Limits of locked memory, open files and processes."""
    found = limits(context.proc, context.process)
    if not found:
        yield unseen(f"the limits of pid {context.pid} may be read by its user and by root only")
        return
    files, locked = found.get("Max open files", math.inf), found.get("Max locked memory", math.inf)
    whose = context.whose
    if files < _FEW_FILES:
        yield problem(f"{whose} limit of open files is {files:g}: one load may need more", _limit("NOFILE", 65536))
    elif files < _LEAST_FILES:
        told = f"{whose} limit of open files is {files:g}: each lease and each connection takes some"
        yield advice(told, _limit("NOFILE", 65536), open_files=files)
    else:
        yield ok(f"{whose} limit of open files is {_shown(files)}")
    if locked < _LEAST_LOCKED_BYTES:
        told = (
            f"{whose} limit of locked memory is {format_size(locked)}: the daemon locks none and CUDA pins without it, "
            "but RDMA and io_uring on the same memory do not"
        )
        yield advice(told, _limit("MEMLOCK", "infinity"), locked_bytes=locked)
    else:
        yield ok(f"{whose} limit of locked memory is {_shown(locked, is_size=True)}")
    yield from _tasks(context, found.get("Max processes", math.inf))


def _tasks(context: Context, processes: float) -> Iterator[Finding]:
    transfer = context.config.transfer
    movers = transfer.movers or auto_movers()
    wanted = movers * (4 + transfer.threads_per_mover) + max(transfer.max_ranges, movers) + 64
    left = context.cgroups.tasks_left()
    least = min(processes, math.inf if left is None else left)
    told = f"{context.whose} limits leave {_shown(least)} processes and threads, movers may take {wanted}"
    if least < wanted:
        yield problem(told, "systemctl edit cached, [Service] TasksMax=infinity", tasks=least, wanted=float(wanted))
    else:
        yield ok(told)


def _limit(name: str, value: object) -> str:
    return f"systemctl edit cached, [Service] Limit{name}={value}"


def _shown(value: float, *, is_size: bool = False) -> str:
    if value == math.inf:
        return "unlimited"
    return format_size(value) if is_size else f"{value:,.0f}"


def kernel(context: Context) -> Iterator[Finding]:
    """Kernels that are known to be in the way."""
    release, version = kernel_release(context.proc), kernel_version(context.proc)
    if version is None:
        yield unseen("the kernel does not tell its version")
        return
    if version < (5, 14):
        told = f"Linux {release} has no MADV_POPULATE_WRITE (since 5.14): pages are allocated by a slower way"
        yield advice(told, "a newer kernel")
    elif (6, 11) <= version <= (6, 13) and gpus(context.proc, context.sys):
        told = f"Linux {release} pins 2 GB at most in one call (6.11 to 6.13): mappings cannot be registered whole"
        yield advice(told, "leave GpuOptions(register_after=…) out: the ring is pinned in small pieces")
    else:
        yield ok(f"Linux {release}")
    if meminfo(context.proc).get("ShmemHugePages") is None:
        yield advice("this kernel has no huge pages for shared memory", "a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
