"""Where a GPU sits: its NUMA node, the processors near it, its PCIe generation. From sysfs; unknown is None."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PCI_DEVICES = Path("/sys/bus/pci/devices")

_GENERATIONS = {"2.5": 1, "5.0": 2, "8.0": 3, "16.0": 4, "32.0": 5, "64.0": 6}  # by gigatransfers per second


@dataclass(frozen=True, slots=True)
class Topology:
    """Of one GPU. ``processors`` are those of its node that this process may use."""

    numa_node: int | None = None
    processors: frozenset[int] | None = None
    pcie_generation: int | None = None


def topology_of(pci_address: str | None, devices: Path = PCI_DEVICES) -> Topology:
    """Of the device at ``0000:3b:00.0``. Where nothing can be read, as in many containers, nothing is known."""
    if not pci_address:
        return Topology()
    folder = devices / pci_address.lower()
    # The link's current speed sinks while the GPU idles, so the greatest one is asked for.
    speed = _read(folder / "max_link_speed").partition(" ")[0]
    node = _read(folder / "numa_node")
    processors = parse_cpulist(_read(folder / "local_cpulist")) & os.sched_getaffinity(0)
    known = node.isdecimal() and bool(processors)  # -1: the firmware does not say
    return Topology(
        numa_node=int(node) if known else None,
        processors=frozenset(processors) if known else None,
        pcie_generation=_GENERATIONS.get(speed),
    )


def parse_cpulist(text: str) -> set[int]:
    """``0-3,8,10-11`` as a set; the empty set for anything else."""
    processors: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            return set()
        processors.update(range(int(first), int(last or first) + 1))
    return processors


@contextlib.contextmanager
def bound_to(processors: frozenset[int] | None) -> Iterator[None]:
    """Runs the calling thread on these processors, and afterwards where it ran before. None: wherever."""
    if processors is None:
        yield
        return
    before = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # a cpuset may have changed meanwhile: then it runs where it is allowed to
        os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
