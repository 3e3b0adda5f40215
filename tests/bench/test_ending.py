"""A benchmark that is ended in the middle leaves nothing: no process, no folder, no segment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cached.cache.build import instance_of
from tests.integration.harness import wait_for

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bench-end-") as name:
        yield Path(name)


def processes_of(folder: Path) -> list[int]:
    """Those whose command line names something below the folder, and that have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_it_leaves_nothing_when_it_is_ended_while_a_daemon_starts(folder: Path, number: int, status: int) -> None:
    command = [sys.executable, "-m", "bench", "nvme", "--quick", "--size", "8MB", "--only", "cached", "--dir", folder]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as bench:
        config = wait_for(lambda: list(folder.glob("cached-bench-*/shards-pool/config.toml")), "a daemon's settings")[0]
        wait_for(lambda: len(processes_of(folder)) > 1, "the daemon")
        bench.send_signal(number)
        said, _ = bench.communicate(timeout=30)
    assert bench.returncode == status, said
    assert "Traceback" not in said
    assert list(folder.iterdir()) == []
    assert processes_of(folder) == []
    instance = instance_of(str(config.parent / "state"))
    assert [path.name for path in Path("/dev/shm").iterdir() if instance in path.name] == []
