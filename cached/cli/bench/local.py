"""The hops within the host: memory, checksums, shared memory, disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cached.cli.bench.hop import Expectation, Measured, Setting, judged, not_measured
from cached.cli.doctor.daemon import nearest
from cached.cli.measure import disk, memory
from cached.cli.measure.facts import block_device, mount_of, pcie_link, read
from cached.errors import CachedError
from cached.units import MIB

_MEMORY_BYTES = 128 * MIB
_QUICK_BYTES = 64 * MIB
_LIMIT_S = 2.0
_SEEN = "seen elsewhere"
_READ_SHARE, _WRITE_SHARE = 0.4, 0.15
"""Of its link: what drives of the middle give of it, reading and, for long, writing."""
_LEAST_READ, _LEAST_WRITE = 1.0, 0.3


def _size(setting: Setting) -> int:
    return _QUICK_BYTES if setting.quick else _MEMORY_BYTES


def processor(setting: Setting) -> Iterator[Measured]:
    """One core: copying, and both checksums that content is proven by."""
    size_bytes, flags = _size(setting), set(_flags(setting))
    yield judged(
        "memcpy", "copying, one core", memory.copy(size_bytes),
        Expectation(6.0, f"10 to 20 GB/s ({_SEEN})"),
        reasons="memory of another NUMA node, a single memory channel, a busy neighbour", check="numa",
    )  # fmt: skip
    yield judged(
        "crc64", "CRC64-NVME, one core", memory.checksum_crc64(size_bytes),
        Expectation(8.0, f"10 to 30 GB/s ({_SEEN})"),
        reasons="a processor without carry-less multiplication (pclmulqdq, vpclmulqdq), or one that is throttled",
        check="processors",
    )  # fmt: skip
    accelerated = bool(flags & {"sha_ni", "sha2"})
    yield judged(
        "sha256", "SHA-256, one core", memory.checksum_sha256(size_bytes),
        Expectation(0.9, "1.2 to 2 GB/s with the processor's SHA instructions")
        if accelerated else Expectation(0.25, "0.3 to 0.6 GB/s without SHA instructions"),
        reasons="a Python whose OpenSSL does not use the processor's instructions, or a throttled core",
        check="processors",
    )  # fmt: skip


def _flags(setting: Setting) -> list[str]:
    for line in read(setting.proc / "cpuinfo").splitlines():
        name, _, words = line.partition(":")
        if name.strip() in {"flags", "Features"}:
            return words.split()
    return []


def shared_memory(setting: Setting) -> Iterator[Measured]:
    """What a load fills: fresh memory, in the pages that the mount gives, and memory of the pool."""
    size_bytes = _size(setting)
    try:
        found = memory.fill(size_bytes, setting.config.l1.path)
    except (OSError, CachedError) as error:
        yield not_measured("shm-fresh", "into fresh shared memory", str(error))
        yield not_measured("shm-recycled", "into recycled shared memory", str(error))
        return
    huge = found.huge_share >= 0.5
    first = f"{found.first.gb_per_s:.1f} GB/s where nothing was touched before"
    yield judged(
        "shm-fresh", f"into fresh shared memory, {'huge' if huge else '4 KiB'} pages, with CRC64", found.fresh,
        Expectation(3.0, f"5 to 14 GB/s with huge pages ({_SEEN})")
        if huge else Expectation(0.4, f"0.5 to 2.5 GB/s with 4 KiB pages ({_SEEN})"),
        reasons="memory that a hypervisor has taken back, fragmented memory, a cgroup near its limit",
        check="huge-pages", note=first,
    )  # fmt: skip
    if not huge:
        yield not_measured(
            "shm-huge", "into fresh shared memory, huge pages",
            f"{setting.config.l1.path} gives none; `cached doctor --only huge-pages` tries a tmpfs that does",
        )  # fmt: skip
    yield judged(
        "shm-recycled", "into recycled shared memory, with CRC64", found.again,
        Expectation(3.0, f"5 to 14 GB/s ({_SEEN})"),
        reasons="a slow or busy memory bus: compare with memcpy", check="numa",
    )  # fmt: skip


def storage(setting: Setting) -> Iterator[Measured]:
    """Each folder of L2, written and read by the movers' code."""
    l2 = setting.config.l2
    if not l2.enabled:
        yield not_measured("l2-write", "memory to L2", "l2.enabled = false")
        yield not_measured("l2-read", "L2 to memory", "l2.enabled = false")
        return
    for folder in l2.folders:
        yield from _folder(setting, folder)


def _folder(setting: Setting, folder: str) -> Iterator[Measured]:
    place = Path(nearest(folder))
    hops = (("l2-write", f"memory to L2 in {folder}"), ("l2-read", f"L2 in {folder} to memory"))
    try:
        alignment = disk.direct_alignment(place)
        found = disk.rates(
            place,
            setting.size_bytes,
            shm=setting.config.l1.path,
            threads=setting.config.transfer.threads_per_mover,
            limit_s=_LIMIT_S,
        )
    except (OSError, CachedError) as error:
        why = f"{place} may not be written by uid {os.geteuid()}" if isinstance(error, PermissionError) else str(error)
        for hop, about in hops:
            yield not_measured(hop, about, why)
        return
    how = f"O_DIRECT, {setting.config.transfer.threads_per_mover} threads" if alignment else "no O_DIRECT: buffered"
    reasons = "something else uses the drive; a full or hot drive; an encrypted or virtual one; few PCIe lanes"
    for (hop, about), span, share, least in zip(
        hops, (found.write, found.read), (_WRITE_SHARE, _READ_SHARE), (_LEAST_WRITE, _LEAST_READ), strict=True
    ):
        expected = _of_the_drive(setting, place, share, least)
        yield judged(hop, about, span, expected, reasons=reasons, check="l2-speed", note=how)


def _of_the_drive(setting: Setting, place: Path, share: float, least: float) -> Expectation:
    mount = mount_of(place, setting.proc)
    drive = block_device(mount, setting.sys) if mount is not None else None
    link = pcie_link(drive) if drive is not None and drive.name.startswith("nvme") else None
    if link is None or not link.max_gb_per_s:
        return Expectation(least, f"{least:g} GB/s and more; the drive does not tell its link")
    return Expectation(share * link.max_gb_per_s, f"{share:.0%} and more of {link}, {link.max_gb_per_s:.1f} GB/s")
