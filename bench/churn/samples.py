"""What the daemon's processes have, looked at every few seconds, and whether it grows."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import DaemonProcess

Sample = dict[str, float]
"""Name of a quantity → its value; ``at_s`` is the time since the churn began."""

TRANSIENT_SHARE = 0.25
"""The default of ``l1.transient_capacity``: what L1 may hold beside its budget."""
_TASKS_OF_A_LEASE = 3
"""Of the daemon's loop: its connection, its call, and what waits for its end."""


class Sampler:
    """Of one daemon. ``heap_file`` is where ``bench.churn.observed`` writes."""

    def __init__(self, daemon: DaemonProcess, heap_file: Path, began_s: float) -> None:
        self._daemon = daemon
        self._heap_file = heap_file
        self.began_s = began_s
        self._answers = 0

    def take(self) -> Sample:
        """Raises OSError, AssertionError or grpc.RpcError while the daemon is not there."""
        pid = self._daemon.pid
        sample: Sample = {"at_s": time.monotonic() - self.began_s, **_of_process(pid)}
        movers = []
        for child in children(pid):
            with suppress(OSError):  # it may end meanwhile
                movers.append(_of_process(child))
        sample["movers"] = len(movers)
        if movers:
            sample |= {f"mover_{name}": value for name, value in movers[0].items()}
        segments = [path.stat().st_size for path in self._daemon.segments() if path.is_file()]
        sample |= {"segments": len(segments), "segment_mb": sum(segments) / 1e6}
        sample |= self._counted() | self._heap(pid)
        if "tasks" in sample:
            sample["other_tasks"] = sample["tasks"] - _TASKS_OF_A_LEASE * sample["leases"]
        return sample

    def _counted(self) -> Sample:
        """What the daemon itself says."""
        stats = self._daemon.stats()
        sample: Sample = {"leases": stats.lease_count, "loads": stats.active_load_count, "models": stats.model_count}
        for level in stats.levels:
            name = pb.Level.Name(level.level).removeprefix("LEVEL_").lower()
            sample[f"{name}_used_mb"] = level.used_bytes / 1e6
            sample[f"{name}_reserved_mb"] = level.reserved_bytes / 1e6
            sample[f"{name}_over_mb"] = _excess_bytes(level) / 1e6
        return sample

    def _heap(self, pid: int) -> Sample:
        os.kill(pid, signal.SIGUSR2)
        deadline_s = time.monotonic() + 5
        while time.monotonic() < deadline_s:
            lines = self._heap_file.read_text().splitlines() if self._heap_file.exists() else []
            if len(lines) > self._answers:
                self._answers = len(lines)
                found = json.loads(lines[-1])
                counted = {"python_blocks": found["blocks"], "tasks": found["tasks"]}
                return counted | {name: value for name, value in found.items() if name.startswith("malloc_")}
            time.sleep(0.05)
        return {}


def children(pid: int) -> list[int]:
    """Processes that this one started and that have not ended, the oldest first."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return sorted(found, key=_started)


def _started(pid: int) -> int:
    """When, in ticks of the kernel; a process that is gone comes last."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return sys.maxsize


def _of_process(pid: int) -> Sample:
    memory = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "rss_mb": _number("Rss", memory) * 1024 / 1e6,
        "pss_mb": _number("Pss", memory) * 1024 / 1e6,
        "anonymous_mb": _number("Anonymous", memory) * 1024 / 1e6,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": _number("Threads", status),
    }


def _number(name: str, text: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0


@dataclass(frozen=True, slots=True)
class Trend:
    """A quantity over the last two thirds of the time: the straight line through it by least squares."""

    first: float
    """The line at its beginning."""

    last: float
    least: float
    most: float
    hours: float

    @property
    def per_hour(self) -> float:
        """Growth."""
        return (self.last - self.first) / self.hours if self.hours else 0.0


def trend(samples: list[Sample], name: str) -> Trend | None:
    """None where too few samples have the quantity."""
    until_s = max((sample["at_s"] for sample in samples), default=0.0)
    points = [(item["at_s"], item[name]) for item in samples if name in item and item["at_s"] >= until_s / 3]
    if len(points) < 3:
        return None
    mean_s = sum(at for at, _ in points) / len(points)
    mean = sum(value for _, value in points) / len(points)
    spread = sum((at - mean_s) ** 2 for at, _ in points)
    slope = sum((at - mean_s) * (value - mean) for at, value in points) / spread if spread else 0.0
    first_s, last_s = points[0][0], points[-1][0]
    values = [value for _, value in points]
    return Trend(
        mean + slope * (first_s - mean_s), mean + slope * (last_s - mean_s), min(values), max(values),
        (last_s - first_s) / 3600,
    )  # fmt: skip


def _excess_bytes(level: pb.LevelStats) -> int:
    """Used and reserved bytes beyond what the level may have, in L1 with its allowance beside the budget."""
    budget_bytes = level.capacity_bytes - level.transient_bytes
    allowance_bytes = int(TRANSIENT_SHARE * budget_bytes) if level.level == pb.LEVEL_L1 else 0
    may_bytes = max(level.capacity_bytes, budget_bytes + allowance_bytes)
    return max(0, level.used_bytes + level.reserved_bytes - may_bytes)
