"""Checks of L2: where it lies, what that place can hold, and how fast it is."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from cached.cli.doctor.access import obstacle
from cached.cli.doctor.checks import Context, Finding, User, advice, ok, problem, unseen
from cached.cli.doctor.daemon import nearest
from cached.cli.measure import disk
from cached.cli.measure.facts import Mount, block_device, chosen, mount_of, number, pcie_link, read
from cached.cli.measure.scratch import left_behind
from cached.setting_checks import resolve_capacity
from cached.units import GIB, MIB, format_size

_MEASURED_BYTES = 256 * MIB
_LIMIT_S = 0.7
_SLOW_READ_GB_PER_S = 1.0
_FEW_INODES = 10_000
_MEMORY = frozenset({"tmpfs", "ramfs"})
_NETWORK = frozenset({
    "9p", "afs", "beegfs", "ceph", "cifs", "fuse.glusterfs", "fuse.s3fs", "fuse.sshfs", "gpfs", "lustre", "ncpfs",
    "nfs", "nfs4", "smb3", "smbfs", "virtiofs", "wekafs",
})  # fmt: skip


def l2(context: Context) -> Iterator[Finding]:
    """Each folder's file system, drive, room and rights; and folders on one drive."""
    if not context.config.l2.enabled:
        yield ok("l2.enabled = false: models are kept in memory only")
        return
    drives: dict[str, list[str]] = defaultdict(list)
    for folder in context.config.l2.folders:
        place = nearest(folder)
        for path in left_behind(Path(place), context.proc):
            yield advice(f"{path} was left by a measurement that was killed", f"rm {path}")
        mount = mount_of(place, context.proc)
        if mount is None:
            yield unseen(f"{folder}: its mount is not told")
            continue
        drives[mount.device].append(folder)
        yield from _folder(context, folder, place, mount)
    for folders in drives.values():
        if len(folders) > 1:
            told = f"{' and '.join(folders)} are on one drive: spreading models over them gains nothing"
            yield advice(told, "l2.paths: one folder a drive")


def _folder(context: Context, folder: str, place: str, mount: Mount) -> Iterator[Finding]:
    found = os.statvfs(place)
    total_bytes, free_bytes = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    budget_bytes = resolve_capacity(context.config.l2.capacity, total_bytes)
    used_bytes = _used_bytes(folder)
    measured = {
        "total_bytes": float(total_bytes), "free_bytes": float(free_bytes), "budget_bytes": float(budget_bytes),
        "free_inodes": float(found.f_favail),
    }  # fmt: skip
    told = f"{folder}: {mount.fs_type} on {_drive(context, mount)}, {format_size(free_bytes)} free"
    told += f" of {format_size(total_bytes)}, budget {context.config.l2.capacity}"
    if mount.fs_type in _MEMORY:
        yield problem(f"{told}: this is memory, not a disk", "l2.path = a folder on NVMe", **measured)
    elif "ro" in mount.options:
        mend = f"mount -o remount,rw {mount.point}   (dmesg tells why)"
        yield problem(f"{told}: it is mounted read-only", mend, **measured)
    elif used_bytes is not None and free_bytes + used_bytes < budget_bytes and len(context.config.l2.folders) == 1:
        told += f" ({format_size(budget_bytes)}), of which others take {format_size(budget_bytes - free_bytes)}"
        fitting = f'l2.capacity = "{max(1, (free_bytes + used_bytes) // GIB)}GiB"'
        yield advice(told, f"{fitting}   (or make room)", **measured)
    else:
        yield ok(told, **measured)
    if found.f_files and found.f_favail < _FEW_INODES:
        yield problem(f"{folder}: {found.f_favail} more files at most", f"df -i {mount.point}", **measured)
    yield from _kind(context, folder, mount)
    yield from _rights(context, folder, place)


def _kind(context: Context, folder: str, mount: Mount) -> Iterator[Finding]:
    if mount.fs_type in _NETWORK:
        told = f"{folder} is on network storage ({mount.fs_type}): L2 is to be nearer than the origin"
        yield advice(told, "l2.path = a folder on local NVMe")
    elif mount.fs_type == "overlay":
        told = f"{folder} is in the container's own layer: it goes with the container, and is slow"
        yield advice(told, "mount a hostPath or a local volume there")
    elif mount.point == "/":
        told = f"{folder} is on the root file system: when models fill it, the host suffers too"
        yield advice(told, "mount a drive of its own there, or lower l2.capacity")
    drive = block_device(mount, context.sys)
    if drive is None:
        return
    scheduler = chosen(drive / "queue/scheduler")
    if number(drive / "queue/rotational") == 1 and not drive.name.startswith(("vd", "xvd")):
        yield advice(f"{drive.name} says that it rotates: a promotion would take minutes", "l2.path = a folder on NVMe")
    elif drive.name.startswith("nvme") and scheduler not in {"none", ""}:
        told = f"{drive.name} has the scheduler {scheduler}: NVMe is faster without one"
        yield advice(told, f"echo none > /sys/block/{drive.name}/queue/scheduler")


def _rights(context: Context, folder: str, place: str) -> Iterator[Finding]:
    user = context.service
    try:
        closed = obstacle(user, place, os.R_OK | os.W_OK | os.X_OK)
    except PermissionError:
        yield unseen(f"{folder} cannot be looked at as {User.this().name}", "sudo cached doctor --only l2")
        return
    if closed:
        made = f"install -d -m 0700 -o {user.name} {folder}" if place != folder else f"chown {user.name} {folder}"
        yield problem(f"{user.name} may not write to {closed}", made)


def _drive(context: Context, mount: Mount) -> str:
    drive = block_device(mount, context.sys)
    if drive is None:
        return mount.source
    words = [drive.name, read(drive / "device/model")]
    link = pcie_link(drive)
    if link is not None and drive.name.startswith("nvme"):
        words.append(f"({link}, {link.max_gb_per_s:.1f} GB/s at most)")
    return " ".join(word for word in words if word)


def _used_bytes(folder: str) -> int | None:
    """What L2 has there already; None where that cannot be seen."""
    total_bytes = 0
    for name in ("blobs", "ingests"):
        try:
            with os.scandir(os.path.join(folder, name)) as entries:
                total_bytes += sum(entry.stat(follow_symlinks=False).st_blocks * 512 for entry in entries)
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return total_bytes


def l2_speed(context: Context) -> Iterator[Finding]:
    """Writes a temporary file into each folder and reads it back, with O_DIRECT, as movers do."""
    if not context.config.l2.enabled:
        yield ok("l2.enabled = false")
        return
    for folder in context.config.l2.folders:
        place = Path(nearest(folder))
        if not os.access(place, os.W_OK | os.X_OK):
            yield unseen(f"{place} may not be written by this user", "sudo cached doctor --only l2-speed")
            continue
        yield from _speed(context, folder, place)


def _speed(context: Context, folder: str, place: Path) -> Iterator[Finding]:
    alignment = disk.direct_alignment(place)
    if alignment is None:
        told = f"{folder} has no O_DIRECT: bytes go through the page cache, which costs a copy and memory"
        yield advice(told, "l2.path = a folder on ext4 or XFS")
    threads = context.config.transfer.threads_per_mover
    found = disk.rates(place, _MEASURED_BYTES, shm=str(context.shm), threads=threads, limit_s=_LIMIT_S)
    read_rate, write_rate = found.read.gb_per_s, found.write.gb_per_s
    measured = {
        "read_gb_per_s": read_rate, "write_gb_per_s": write_rate, "read_cpu_s_per_gb": found.read.cpu_s_per_gb,
        "alignment_bytes": float(alignment or 0),
    }  # fmt: skip
    how = f"O_DIRECT at {alignment} bytes" if alignment else "buffered"
    told = f"{folder}: reads {read_rate:.1f} GB/s, writes {write_rate:.1f} GB/s ({how}, {threads} threads)"
    if read_rate < _SLOW_READ_GB_PER_S:
        told += f": a promotion of 100 GB takes {100 / max(read_rate, 0.001):.0f} s"
        yield advice(told, "iostat -x 1   (does something else use the drive?)", **measured)
    else:
        yield ok(told, **measured)
