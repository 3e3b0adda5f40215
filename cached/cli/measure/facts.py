"""What the checks read of a host: mounts, block devices, PCIe links, limits, kernel settings."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PCIE_LANE_GB_PER_S = {2.5: 0.25, 5.0: 0.5, 8.0: 0.985, 16.0: 1.969, 32.0: 3.938, 64.0: 7.563}
"""What a lane carries, by gigatransfers per second, its encoding taken off. PCI Express Base Specification."""
_GENERATIONS = {2.5: 1, 5.0: 2, 8.0: 3, 16.0: 4, 32.0: 5, 64.0: 6}
_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo, as proc_pid_mountinfo(5) describes it."""

    point: str
    device: str
    fs_type: str
    source: str
    options: frozenset[str]

    def option(self, name: str) -> str:
        """The value of ``name=value``; empty where it is not said."""
        return next((text.partition("=")[2] for text in self.options if text.startswith(f"{name}=")), "")


@dataclass(frozen=True, slots=True)
class Link:
    """A PCIe link, as it is now and at most; 0: not known."""

    speed: float
    width: int
    max_speed: float
    max_width: int

    @property
    def max_gb_per_s(self) -> float:
        """What it carries at its best."""
        return _PCIE_LANE_GB_PER_S.get(self.max_speed, 0.0) * self.max_width

    def __str__(self) -> str:
        return f"PCIe gen {_GENERATIONS.get(self.max_speed, '?')} x{self.max_width}"

    @property
    def now(self) -> str:
        """As it is now."""
        return f"gen {_GENERATIONS.get(self.speed, '?')} x{self.width}"


def read(path: Path) -> str:
    """A file's text without what surrounds it; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def number(path: Path) -> int | None:
    """A file that holds a number; None for any other."""
    text = read(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def mount_of(path: str | Path, proc: Path = Path("/proc")) -> Mount | None:
    """The mount that a path lies on; the last of several on one folder is the one that is seen."""
    wanted = os.path.realpath(path)
    best: Mount | None = None
    for line in read(proc / "self/mountinfo").splitlines():
        fields, _, rest = line.partition(" - ")
        parts, more = fields.split(" "), rest.split(" ")
        if len(parts) < 6 or len(more) < 3:
            continue
        point = _unescaped(parts[4])
        inside = wanted == point or wanted.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.point)):
            options = frozenset(parts[5].split(",")) | frozenset(more[2].split(","))
            best = Mount(point, parts[2], more[0], _unescaped(more[1]), options)
    return best


def block_device(mount: Mount, sys: Path) -> Path | None:
    """The folder of the whole drive in /sys/block (of a partition: its parent); None where it is no local drive."""
    link = sys / "dev/block" / mount.device
    if not link.exists():  # btrfs and its like have numbers of their own
        link = sys / "class/block" / Path(mount.source).name
        if not mount.source.startswith("/dev/") or not link.exists():
            return None
    folder = link.resolve()
    return folder.parent if (folder / "partition").exists() else folder


def pcie_link(device: Path) -> Link | None:
    """Of the nearest device upwards that has one; None for what does not hang on PCIe, or hides it."""
    for folder in (device, *device.parents):
        if (folder / "max_link_speed").exists():
            return Link(
                _speed(folder / "current_link_speed"),
                number(folder / "current_link_width") or 0,
                _speed(folder / "max_link_speed"),
                number(folder / "max_link_width") or 0,
            )
    return None


def limits(proc: Path, process: str) -> Mapping[str, float]:
    """Soft limits by name, such as ``Max locked memory``; unlimited is infinity. Empty where they cannot be read."""
    found: dict[str, float] = {}
    for line in read(proc / process / "limits").splitlines()[1:]:
        match = re.match(r"(Max [a-z ]+?)\s{2,}(\S+)\s+(\S+)", line)
        if match:
            found[match[1]] = float("inf") if match[2] == "unlimited" else float(match[2])
    return found


def kernel_release(proc: Path) -> str:
    """Such as ``6.8.0-45-generic``."""
    return read(proc / "sys/kernel/osrelease")


def kernel_version(proc: Path) -> tuple[int, int] | None:
    """Major and minor number."""
    match = re.match(r"(\d+)\.(\d+)", kernel_release(proc))
    return (int(match[1]), int(match[2])) if match else None


def chosen(path: Path) -> str:
    """The word in brackets, as many files of /sys mark it; else all of the text."""
    text = read(path)
    match = re.search(r"\[([^\]]+)\]", text)
    return match[1] if match else text


def stalled_percent(path: Path, kind: str = "full") -> float | None:
    """Pressure stall information: how much of the last 10 s was lost. None where the kernel does not tell."""
    match = re.search(rf"^{kind} avg10=([0-9.]+)", read(path), re.MULTILINE)
    return float(match[1]) if match else None


def _speed(path: Path) -> float:
    match = re.match(r"([0-9.]+)", read(path))
    return float(match[1]) if match else 0.0


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)
