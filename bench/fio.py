"""The limit: fio, direct reads into its own buffers, which are used again and again. It checks nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from bench.results import Role, Sample, Unavailable

_PAGE_BYTES = 4096


class FioContestant:
    """Reads ``files`` once, cold, with ``threads`` threads in all, each ``block_bytes`` at a time."""

    role = Role.LIMIT

    def __init__(self, name: str, files: Sequence[Path], *, threads: int, block_bytes: int) -> None:
        self.name, self.version = name, ""
        self.title = f"fio, direct, {threads} threads × {block_bytes >> 20} MiB (the limit)"
        self._files = files
        self._threads = threads
        self._block_bytes = block_bytes

    def prepare(self) -> None:
        """Raises Unavailable where fio is not installed."""
        try:
            printed = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise Unavailable("fio is not installed: apt-get install fio") from None
        self.version = printed.stdout.strip().removeprefix("fio-")
        drop_from_page_cache(self._files)

    def run(self) -> Sample:
        """Its own figures of the reads alone; processor time of the whole process."""
        before = os.times()
        printed = subprocess.run(self._command(), capture_output=True, text=True, check=True).stdout
        after = os.times()
        jobs = [job["read"] for job in json.loads(printed)["jobs"]]
        cpu_s = after.children_user + after.children_system - before.children_user - before.children_system
        return Sample(max(job["runtime"] for job in jobs) / 1e3, sum(job["io_bytes"] for job in jobs), cpu_s)

    def close(self) -> None:
        """Nothing is left."""

    def _command(self) -> list[str]:
        each = max(1, self._threads // len(self._files))
        command = ["fio", "--output-format=json", "--rw=read", "--direct=1", "--ioengine=psync", "--thread"]
        command += [f"--bs={self._block_bytes}"]
        for number, path in enumerate(self._files):
            part_bytes = path.stat().st_size // each // _PAGE_BYTES * _PAGE_BYTES
            command += [f"--name=file{number}", f"--filename={path}", f"--numjobs={each}"]
            command += [f"--size={part_bytes}", f"--offset_increment={part_bytes}"]
        return command


def drop_from_page_cache(files: Sequence[Path]) -> None:
    """What is dirty is written, then every page is dropped, so that the next reader goes to the drive."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
