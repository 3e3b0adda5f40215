"""GPUs and their driver, as the host's files tell them: nothing of CUDA is loaded here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached.cli.doctor.access import obstacle
from cached.cli.doctor.checks import Context, Finding, advice, ok, problem, unseen
from cached.cli.measure.facts import Link, number, pcie_link, read
from cached.units import format_size

_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")
"""Display controllers, with and without a display. PCI Code and ID Assignment Specification."""
_BAR_1 = 1
_NODES = ("nvidiactl", "nvidia-uvm", "nvidia0")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. ``node``: its NUMA node; None where the firmware does not say."""

    address: str
    name: str
    link: Link | None
    node: int | None
    bar_bytes: int


def gpus(proc: Path, sys: Path) -> list[Gpu]:
    """Those on PCIe, by address."""
    found = []
    for folder in sorted((sys / "bus/pci/devices").glob("*")):
        if read(folder / "vendor") == _NVIDIA and read(folder / "class").startswith(_GPU_CLASSES):
            node = number(folder / "numa_node")
            name = _field(read(proc / "driver/nvidia/gpus" / folder.name / "information"), "Model")
            found.append(
                Gpu(
                    folder.name,
                    name or f"NVIDIA device {read(folder / 'device')}",
                    pcie_link(folder),
                    node if node is not None and node >= 0 else None,
                    _bar_bytes(folder),
                )
            )
    return found


def gpu(context: Context) -> Iterator[Finding]:
    """Each GPU's link, driver and memory node, and whether workers may use it."""
    found = gpus(context.proc, context.sys)
    if not found:
        yield ok("no NVIDIA GPU: this host stores weights and uploads none")
        return
    yield from _driver(context)
    for item in found:
        yield _link(item)
    yield from _nodes(context)


def _driver(context: Context) -> Iterator[Finding]:
    version = re.search(r"Kernel Module\s+(?:for \S+\s+)?([0-9.]+)", read(context.proc / "driver/nvidia/version"))
    if version is None:
        yield problem("there is a GPU, and the NVIDIA driver is not loaded", "modprobe nvidia")
        return
    answer = context.tool(["nvidia-smi", "--query-gpu=name,persistence_mode", "--format=csv,noheader"])
    if answer is None:
        yield unseen(f"driver {version[1]}; nvidia-smi is not here, or does not answer")
    elif "Disabled" in answer:
        told = f"driver {version[1]}, not persistent: it is set up again for the first process after a pause"
        yield advice(told, "systemctl enable --now nvidia-persistenced   (or nvidia-smi -pm 1)")
    else:
        yield ok(f"driver {version[1]}")


def _link(item: Gpu) -> Finding:
    where = f"on NUMA node {item.node}" if item.node is not None else "on a NUMA node that the firmware does not tell"
    name = f"{item.name} at {item.address}, {where}"
    if item.link is None:
        return unseen(f"{name}: its PCIe link is not shown, as in many virtual machines")
    link = item.link
    measured = {
        "link_gb_per_s": link.max_gb_per_s, "width": float(link.width), "max_width": float(link.max_width),
        "speed_gt_per_s": link.speed, "max_speed_gt_per_s": link.max_speed, "bar1_bytes": float(item.bar_bytes),
    }  # fmt: skip
    told = f"{name}: {link}, {link.max_gb_per_s:.0f} GB/s at most"
    if 0 < link.width < link.max_width:
        # Unlike the speed, the width of an idle link stays.
        return problem(
            f"{told}, but now x{link.width}: it is seated badly, shares its lanes, or sits in a narrower slot",
            f"lspci -vv -s {item.address} | grep LnkSta   (look at the slot; bifurcation is set in the firmware)",
            **measured,
        )
    if 0 < link.speed < link.max_speed:
        told += f" (now {link.now}: links of idle GPUs slow down, and wake with the first copy)"
    if item.bar_bytes:
        told += f", BAR1 {format_size(item.bar_bytes)}"
    return ok(told, **measured)


def _nodes(context: Context) -> Iterator[Finding]:
    """The files that a process opens to use CUDA."""
    folder = context.proc.parent / "dev"
    for name in _NODES:
        path = folder / name
        try:
            closed = obstacle(context.worker, path, os.R_OK | os.W_OK)
        except FileNotFoundError:
            told = f"{path} is not there: this container was started without its GPUs, or the driver makes it later"
            yield advice(told, "nvidia-modprobe -c 0 -u   (in a container: give it the GPU)")
            return
        if closed:
            yield problem(f"{context.worker.name} may not open {path}", f"chmod a+rw {path}")
            return
    yield ok(f"{context.worker.name} may open the GPUs' device files")


def _bar_bytes(folder: Path) -> int:
    """The size of BAR1, from the lines ``start end flags`` of ``resource``."""
    lines = read(folder / "resource").splitlines()
    try:
        start, end = (int(text, 16) for text in lines[_BAR_1].split()[:2])
    except (IndexError, ValueError):
        return 0
    return end - start + 1 if end else 0


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else ""
