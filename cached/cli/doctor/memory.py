"""Checks of the memory that L1 is made of: the mount, its pages, what lies in it, and what the host has."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cached.cache.build import instance_of
from cached.cache.capacity import l1_budget, meminfo
from cached.cli.doctor.access import may
from cached.cli.doctor.checks import Context, Finding, advice, ok, problem, unseen
from cached.cli.doctor.daemons import instances
from cached.cli.measure import memory as measure
from cached.cli.measure.facts import chosen, mount_of, number, read
from cached.cli.measure.scratch import left_behind
from cached.levels.shm import SHM_FOLDER
from cached.units import GIB, MIB, format_size

FILL_BYTES = 128 * MIB
_LEAST_BYTES = 256 * MIB
_BLOCK_BYTES = 512
_LARGE_SHARE = 0.8
_TRIAL_TIMEOUT_S = 30.0
_TRIAL = (
    "import json; from cached.cli.measure import memory; found = memory.fill({size}); "
    'print(json.dumps({{"fresh": found.fresh.gb_per_s, "share": found.huge_share}}))'
)
_WORTH = 1.2
"""A fifth faster: below that it is noise."""
_TAKEN_BACK = 2.0
_NEVER = frozenset({"", "never"})


def shared_memory(context: Context) -> Iterator[Finding]:
    """Whether the mount has room for what L1 is configured to take, and is as it should be."""
    mount = mount_of(context.shm, context.proc)
    if mount is not None and mount.fs_type not in {"tmpfs", "ramfs"}:
        yield problem(f"{context.shm} is {mount.fs_type}, not shared memory", f"mount -t tmpfs tmpfs {context.shm}")
        return
    budget = l1_budget(context.config.l1.capacity, context.proc)
    place = os.statvfs(context.shm)
    total_bytes, free_bytes = place.f_blocks * place.f_frsize, place.f_bavail * place.f_frsize
    ours_bytes = sum(part.size_bytes for part in _segments(context.shm).values())
    others_bytes = max(0, total_bytes - free_bytes - ours_bytes)
    measured = {
        "mount_bytes": float(total_bytes), "budget_bytes": float(budget.size_bytes),
        "ours_bytes": float(ours_bytes), "others_bytes": float(others_bytes),
    }  # fmt: skip
    sizes = f"{context.shm} is {format_size(total_bytes)}, L1 is {budget.because} ({format_size(budget.size_bytes)})"
    mend = _larger(context, budget.size_bytes)
    if total_bytes < max(_LEAST_BYTES, budget.size_bytes // 2):
        yield problem(sizes, mend, **measured)
    elif total_bytes < budget.size_bytes:
        yield advice(sizes, mend, **measured)
    elif total_bytes - others_bytes < budget.size_bytes:
        told = f"{sizes}, and other programs hold {format_size(others_bytes)} of it"
        yield advice(told, f"du -sh {context.shm}/* | sort -h", **measured)
    else:
        yield ok(f"{sizes}; others hold {format_size(others_bytes)}", **measured)
    if mount is not None and "ro" in mount.options:
        yield problem(f"{context.shm} is mounted read-only", f"mount -o remount,rw {context.shm}")
    elif not may(context.service, context.shm, os.W_OK | os.X_OK):
        yield problem(f"{context.service.name} may not create segments in {context.shm}", f"chmod 1777 {context.shm}")
    elif mount is not None and not {"nosuid", "nodev"} <= mount.options:
        told = f"{context.shm} is mounted without nosuid and nodev: files there may do what weights never need"
        yield advice(told, f"mount -o remount,nosuid,nodev {context.shm}")


def _larger(context: Context, budget_bytes: int) -> str:
    size_gib = -(-budget_bytes // GIB)
    if in_pod(context):
        return f"mount an emptyDir at /dev/shm: {{medium: Memory, sizeLimit: {size_gib}Gi}}"
    return f"mount -o remount,size={size_gib}G {context.shm}"


def in_pod(context: Context) -> bool:
    """Whether this looks like a container of Kubernetes."""
    return "KUBERNETES_SERVICE_HOST" in context.environment or "kubepods" in read(context.proc / "self/cgroup")


def huge_pages(context: Context) -> Iterator[Finding]:
    """Fills fresh shared memory as a load does, and the same memory again; and once more in huge pages, if it can."""
    mount = mount_of(context.shm, context.proc)
    policy = mount.option("huge") if mount is not None else ""
    everywhere = chosen(context.sys / "kernel/mm/transparent_hugepage/shmem_enabled")
    place = os.statvfs(context.shm)
    if place.f_bavail * place.f_frsize < 2 * FILL_BYTES:
        yield unseen(f"{context.shm} has too little room left to measure in")
        return
    found = measure.fill(FILL_BYTES, str(context.shm))
    measured = {
        "first_touch_gb_per_s": found.first.gb_per_s,
        "fresh_gb_per_s": found.fresh.gb_per_s,
        "fresh_cpu_s_per_gb": found.fresh.cpu_s_per_gb,
        "again_gb_per_s": found.again.gb_per_s,
        "huge_page_share": found.huge_share,
    }
    speeds = f"{found.fresh.gb_per_s:.1f} GB/s into fresh memory, {found.again.gb_per_s:.1f} into the same again"
    if found.fresh.gb_per_s > _TAKEN_BACK * found.first.gb_per_s:
        speeds += f" ({found.first.gb_per_s:.1f} where it was not touched before: the hypervisor had taken it back)"
    if found.huge_share >= 0.5:
        yield ok(f"{context.shm} gives huge pages (huge={policy}): {speeds}", **measured)
        return
    if everywhere == "deny":
        told = f"the kernel denies shared memory huge pages, whatever its mounts say: {speeds}"
        yield advice(told, f"echo never > {context.sys}/kernel/mm/transparent_hugepage/shmem_enabled", **measured)
        return
    if policy not in _NEVER:
        told = f"{context.shm} is mounted huge={policy} and gave none: memory is fragmented, or short. {speeds}"
        yield advice(told, "echo 1 > /proc/sys/vm/compact_memory", **measured)
        return
    trial = _trial()
    told = f"{context.shm} gives no huge pages: {speeds}"
    mend = f"mount -o remount,huge=advise {context.shm}"
    if trial is None:
        told += "; what they would give can only be measured where mount namespaces are permitted"
        yield advice(told, mend, **measured)
        return
    measured["huge_fresh_gb_per_s"] = trial
    told += f"; a tmpfs with huge pages took {trial:.1f} GB/s"
    yield advice(told, mend, **measured) if trial > _WORTH * found.fresh.gb_per_s else ok(told, **measured)


def _trial() -> float | None:
    """GB/s into fresh memory of a small tmpfs with huge pages, in a mount namespace that ends with it."""
    script = 'mount -t tmpfs -o "$0" none /dev/shm && exec "$@"'
    options = f"size={3 * FILL_BYTES},huge=advise"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, options]
    command += [sys.executable, "-P", "-c", _TRIAL.format(size=FILL_BYTES)]
    try:
        done = subprocess.run(  # noqa: S603 - this interpreter, and code from here
            command,
            capture_output=True,
            text=True,
            timeout=_TRIAL_TIMEOUT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return float(found["fresh"]) if found["share"] >= 0.5 else None


@dataclass(slots=True)
class _Part:
    """What one instance has in shared memory."""

    count: int = 0
    size_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.count} segments with {format_size(self.size_bytes)}"


def segments(context: Context) -> Iterator[Finding]:
    """Whose the segments are that lie in shared memory: of daemons that are there, or of none any more."""
    found = _segments(context.shm)
    alive, silent = instances(context)
    own = instance_of(context.config.daemon.state_dir) if context.config.daemon.state_dir else ""
    for path in [item for folder in {context.shm, Path(SHM_FOLDER)} for item in left_behind(folder, context.proc)]:
        yield advice(f"{path} was left by a measurement that was killed", f"rm -r {path}")
    lost = {name: part for name, part in found.items() if name not in alive and not name.startswith("measure-")}
    waiting = lost.pop(own, None)
    if waiting is not None:
        told = f"{waiting} wait for a daemon with the state folder {context.config.daemon.state_dir}, to be adopted"
        mend = f"systemctl start cached   (or give the memory back: rm {context.shm}/cached.{own}.*)"
        yield advice(told, mend, size_bytes=float(waiting.size_bytes))
    if lost:
        yield _lost(context, lost, silent)
    elif waiting is None:
        used_bytes = sum(part.size_bytes for part in found.values())
        what = f"{format_size(used_bytes)} in segments, all of daemons that run" if found else "no segments are left"
        yield ok(what, size_bytes=float(used_bytes))


def _lost(context: Context, lost: Mapping[str, _Part], silent: Sequence[str]) -> Finding:
    """Segments of instances that no daemon answers for."""
    size_bytes = sum(part.size_bytes for part in lost.values())
    whose = "another daemon" if len(lost) == 1 else f"{len(lost)} other daemons"
    told = f"{sum(part.count for part in lost.values())} segments with {format_size(size_bytes)} were made by {whose}"
    if silent:
        return unseen(f"{told}; these run here and did not tell what is theirs: {', '.join(silent)}")
    names = min(lost) if len(lost) == 1 else f"{{{','.join(sorted(lost))}}}"
    mend = f"rm {context.shm}/cached.{names}.*   (look first that no daemon in another container uses them)"
    measured = {"instances": float(len(lost)), "size_bytes": float(size_bytes)}
    return advice(f"{told}, of which none is seen here any more", mend, **measured)


def _segments(folder: Path) -> dict[str, _Part]:
    """By instance."""
    found: dict[str, _Part] = defaultdict(_Part)
    with os.scandir(folder) as entries:
        for entry in entries:
            match = re.match(r"cached\.([0-9A-Za-z_-]{1,32})\.\w+\.", entry.name)
            if match is None:
                continue
            try:
                size_bytes = entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
            except FileNotFoundError:
                continue
            found[match[1]].count += 1
            found[match[1]].size_bytes += size_bytes
    return dict(found)


def host_memory(context: Context) -> Iterator[Finding]:
    """Whether the host has the memory that L1 is configured to take, and would promise it."""
    memory = meminfo(context.proc)
    budget = l1_budget(context.config.l1.capacity, context.proc)
    total_bytes, available_bytes = memory["MemTotal"], memory["MemAvailable"]
    measured = {
        "memory_bytes": float(total_bytes), "available_bytes": float(available_bytes),
        "shmem_bytes": float(memory.get("Shmem", 0)), "budget_bytes": float(budget.size_bytes),
    }  # fmt: skip
    sizes = f"L1 is {budget.because} ({format_size(budget.size_bytes)}), the host has {format_size(total_bytes)}"
    fitting = f'l1.capacity = "{int(total_bytes * _LARGE_SHARE) // GIB}GiB"' if total_bytes > 2 * GIB else "50%"
    if budget.size_bytes > total_bytes:
        yield problem(sizes, fitting, **measured)
    elif budget.size_bytes > total_bytes * _LARGE_SHARE:
        yield advice(f"{sizes}: less than a fifth is left for everything else", fitting, **measured)
    else:
        yield ok(f"{sizes}, {format_size(available_bytes)} of it available", **measured)
    if number(context.proc / "sys/vm/overcommit_memory") == 2:
        left_bytes = max(0, memory.get("CommitLimit", 0) - memory.get("Committed_AS", 0))
        wanted_bytes = max(0, budget.size_bytes - memory.get("Shmem", 0))
        told = f"the kernel promises no more than it has (vm.overcommit_memory=2): {format_size(left_bytes)} are left"
        if left_bytes < wanted_bytes:
            yield problem(f"{told}, L1 may still want {format_size(wanted_bytes)}", "sysctl -w vm.overcommit_memory=0")
        else:
            yield ok(told, commit_left_bytes=float(left_bytes))
