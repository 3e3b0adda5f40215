"""A memory cgroup of a test's own, of version 1 or 2, below the one that the tests run in: as a container has one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex

import pytest

from cached.cgroups import Cgroups
from tests.integration.harness import wait_for


class Cgroup:
    """A folder of the cgroup file system."""

    def __init__(self, folder: Path, *, legacy: bool) -> None:
        self.folder = folder
        self._limit = folder / ("memory.limit_in_bytes" if legacy else "memory.max")
        self._used = folder / ("memory.usage_in_bytes" if legacy else "memory.current")
        self._events = folder / ("memory.oom_control" if legacy else "memory.events")
        self.entry = ("sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh")
        """Starts a program in it."""

    def limit(self, size_bytes: int) -> None:
        self._limit.write_text(str(size_bytes))

    def used_bytes(self) -> int:
        return int(self._used.read_text())

    def oom_kills(self) -> int:
        """How many processes of it the kernel has killed for want of memory."""
        counts = dict(line.split() for line in self._events.read_text().splitlines())
        return int(counts["oom_kill"])

    def processes(self) -> list[int]:
        return [int(line) for line in (self.folder / "cgroup.procs").read_text().split()]

    def remove(self) -> None:
        """Kills all that is in it, and takes it away, as a container runtime does."""

        def empty() -> bool:
            for pid in self.processes():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self.processes()

        wait_for(empty, "the end of all that is in the cgroup")
        self.folder.rmdir()


@contextmanager
def memory_cgroup(size_bytes: int) -> Iterator[Cgroup]:
    """A cgroup with this limit, gone afterwards. Skips the test where none can be made."""
    name = f"cached-test-{token_hex(6)}"
    for cgroup in Cgroups().memory():
        legacy = (cgroup.folder / "memory.limit_in_bytes").exists()
        made = cgroup.folder / name
        try:
            made.mkdir()
        except OSError:
            continue
        found = Cgroup(made, legacy=legacy)
        try:
            found.limit(size_bytes)
        except OSError:
            made.rmdir()  # of version 2, where its parent hands no memory controller on
            continue
        try:
            yield found
        finally:
            if made.exists():
                found.remove()
        return
    pytest.skip("no memory cgroup can be made here: that needs root, and a writable /sys/fs/cgroup")
