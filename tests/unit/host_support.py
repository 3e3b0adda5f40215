"""Hosts as their /proc and /sys tell of them, laid out in a folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from cached.cli.connect import Globals
from cached.cli.doctor.checks import Context, User
from cached.config import load_config

GIB_KB = 1 << 20
NVIDIA = "0x10de"


class Host:
    """Files below ``root``; ``context`` looks at them. A small virtual machine unless more is laid out."""

    def __init__(self, root: Path, *, memory_gib: int = 64) -> None:
        self.root = root
        self.proc, self.sys = root / "proc", root / "sys"
        self.put("proc/sys/kernel/osrelease", "6.8.0-45-generic\n")
        self.memory(total=memory_gib, available=memory_gib - 4)
        self.limits()
        self.put("proc/self/cgroup", "0::/\n")
        self.put("proc/self/mountinfo", "")

    def put(self, path: str, text: str) -> Path:
        place = self.root / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
        return place

    def memory(self, **gib: int) -> None:
        names = {"total": "MemTotal", "available": "MemAvailable", "shmem": "Shmem", "limit": "CommitLimit"}
        names |= {"committed": "Committed_AS"}
        lines = [f"{names[name]}: {size * GIB_KB} kB" for name, size in ({"shmem": 0} | gib).items()]
        self.put("proc/meminfo", "\n".join([*lines, "ShmemHugePages: 0 kB"]) + "\n")

    def limits(self, *, files: object = 65536, locked: object = "unlimited", processes: object = "unlimited") -> None:
        rows = [("Max open files", files, "files"), ("Max locked memory", locked, "bytes")]
        rows += [("Max processes", processes, "processes")]
        text = "".join(f"{name:<25} {value!s:<20} {value!s:<20} {unit}\n" for name, value, unit in rows)
        self.put("proc/self/limits", f"{'Limit':<25} {'Soft Limit':<20} {'Hard Limit':<20} Units\n{text}")

    def mount(self, point: str, fs_type: str, source: str, *, options: str = "rw", device: str = "0:50") -> None:
        path = self.proc / "self/mountinfo"
        line = f"30 1 {device} / {point} {options} shared:1 - {fs_type} {source} {options}\n"
        path.write_text(path.read_text() + line)

    def cgroup_2(self, path: str, **files: object) -> None:
        """Of a cgroup below the mount; ``max``, ``current``, ``high``, ``swap``, ``stat``, ``cpu``."""
        names = {"max": "memory.max", "current": "memory.current", "high": "memory.high", "swap": "memory.swap.max"}
        names |= {"stat": "memory.stat", "cpu": "cpu.max", "pids": "pids.max", "pids_now": "pids.current"}
        for name, value in ({"stat": "shmem 0\n"} | files).items():
            self.put(f"sys/fs/cgroup/{path}/{names[name]}".replace("//", "/"), f"{value}\n")

    def gpu(self, address: str, *, speed: str = "32.0", width: int = 16, node: int = 0, **now: Any) -> None:
        folder = f"sys/bus/pci/devices/{address}"
        self.put(f"{folder}/vendor", NVIDIA)
        self.put(f"{folder}/class", "0x030200")
        self.put(f"{folder}/device", "0x2330")
        self.put(f"{folder}/numa_node", str(node))
        self.put(f"{folder}/max_link_speed", f"{speed} GT/s PCIe")
        self.put(f"{folder}/max_link_width", str(width))
        self.put(f"{folder}/current_link_speed", f"{now.get('now_speed', speed)} GT/s PCIe")
        self.put(f"{folder}/current_link_width", str(now.get("now_width", width)))
        self.put(f"{folder}/resource", "0x0 0x0 0x0\n0x0000380000000000 0x0000381fffffffff 0x14220c\n")
        self.put(f"proc/driver/nvidia/gpus/{address}/information", "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n")

    def driver(self, version: str = "550.54.15") -> None:
        self.put(
            "proc/driver/nvidia/version", f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Mar  5\n"
        )

    def node(self, number: int, *, cpus: str, memory_gib: int, shmem_gib: int = 0) -> None:
        folder = f"sys/devices/system/node/node{number}"
        self.put(f"{folder}/cpulist", cpus)
        text = f"Node {number} MemTotal: {memory_gib * GIB_KB} kB\nNode {number} Shmem: {shmem_gib * GIB_KB} kB\n"
        self.put(f"{folder}/meminfo", text)

    def drive(self, name: str, device: str, *, model: str = "", scheduler: str = "none", rotational: int = 0) -> Path:
        """A drive with one partition, which has the number ``device``; its folder."""
        folder = self.sys / "devices/pci0000:00/0000:01:00.0" / name
        self.put(f"{folder.relative_to(self.root)}/queue/scheduler", f"mq-deadline [{scheduler}]")
        self.put(f"{folder.relative_to(self.root)}/queue/rotational", str(rotational))
        self.put(f"{folder.relative_to(self.root)}/device/model", model)
        self.put(f"{folder.relative_to(self.root)}/{name}p1/partition", "1")
        link = self.sys / "dev/block" / device
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder / f"{name}p1")
        return folder

    def context(self, settings: dict[str, str] | None = None, **fields: Any) -> Context:
        """What checks are given here. ``settings``: ``l1.capacity`` → its text."""
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.root)}
        chosen = {"daemon.state_dir": str(self.root / "state")} | (settings or {})
        if "l2.paths" not in chosen:
            chosen["l2.path"] = str(self.root / "l2")
        loaded = load_config(Path(os.devnull), environment, chosen)
        context = Context(
            Globals(str(self.root / "cached.sock")), str(self.root / "cached.sock"), "python", environment,
            settings=loaded, proc=self.proc, sys=self.sys, tool=lambda _command: None,
        )  # fmt: skip
        return replace(context, **fields)


def user(name: str = "someone", uid: int = 65533, *gids: int) -> User:
    return User(name, uid, frozenset(gids))
