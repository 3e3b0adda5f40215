"""The limit of a drive: fio, direct reads into its own buffers, which are used again and again. It checks nothing."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import Role, Sample, Unavailable

_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2 << 20
_STEP_BYTES = 16 << 20
_WITH_HUGE_PAGES = """
mount -t tmpfs -o huge=always none "$1" || exit 99
number=0
while [ $number -lt $2 ]; do head -c $3 /dev/zero > "$1/$number" || exit 99; number=$((number + 1)); done
shift 3
exec "$@"
"""


class FioContestant:
    """Reads ``files`` once, cold, with ``threads`` threads in all, each ``block_bytes`` at a time.

    ``huge``: its buffers are of huge pages, in a tmpfs of its own; a drive may be several times as fast then.
    """

    role = Role.LIMIT

    def __init__(
        self, name: str, files: Sequence[Path], *, threads: int, block_bytes: int, huge: bool, folder: Path
    ) -> None:
        self.name, self.version = name, ""
        pages = "huge pages" if huge else "4 KiB pages"
        self.title = f"fio, direct, {threads} threads × {block_bytes >> 20} MiB, into {pages} (the limit)"
        self._files = files
        self._each = max(1, threads // len(files))
        self._block_bytes = block_bytes
        self._buffers = folder if huge else None

    def prepare(self) -> None:
        """Raises Unavailable where fio is not installed."""
        try:
            printed = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True)
        except FileNotFoundError:
            raise Unavailable("fio is not installed: apt-get install fio") from None
        self.version = printed.stdout.strip().removeprefix("fio-")
        make_cold(self._files)

    def run(self) -> Sample:
        """Wall and processor time of the reads alone, as fio says them. Raises Unavailable for no huge pages."""
        done = subprocess.run(self._command(), capture_output=True, text=True, check=False)
        if done.returncode == 99 or "unshare:" in done.stderr:
            raise Unavailable(f"a mount with huge pages is not permitted: {done.stderr.strip()[:200]}")
        done.check_returncode()
        jobs: list[dict[str, Any]] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        cpu_s = sum((job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1e3 for job in jobs)
        reads = [job["read"] for job in jobs]
        return Sample(max(read["runtime"] for read in reads) / 1e3, sum(read["io_bytes"] for read in reads), cpu_s)

    def close(self) -> None:
        """Nothing is left: the mount went with its process."""

    def _command(self) -> list[str]:
        jobs: list[str] = []
        number, block_bytes = 0, self._block_bytes
        for path in self._files:
            part_bytes = max(_PAGE_BYTES, path.stat().st_size // self._each // _PAGE_BYTES * _PAGE_BYTES)
            block_bytes = min(block_bytes, part_bytes)
            for part in range(self._each):
                jobs += [f"--name=job{number}", f"--filename={path}", f"--offset={part * part_bytes}"]
                jobs += [f"--size={part_bytes}", *self._memory(number)]
                number += 1
        fio = ["fio", "--output-format=json", "--rw=read", "--direct=1", "--ioengine=psync", "--thread"]
        return [*self._wrap(number), *fio, f"--bs={block_bytes}", *jobs]

    def _memory(self, number: int) -> list[str]:
        return [f"--mem=mmapshared:{self._buffers / str(number)}"] if self._buffers else []

    def _wrap(self, count: int) -> list[str]:
        if self._buffers is None:
            return []
        self._buffers.mkdir(exist_ok=True)
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        size = str(self._block_bytes + _HUGE_PAGE_BYTES)
        return ["unshare", *user, "--mount", "sh", "-c", _WITH_HUGE_PAGES, "sh", str(self._buffers), str(count), size]


def make_cold(files: Sequence[Path]) -> None:
    """Nothing of the files is in our page cache, and all that a host may keep of a virtual drive is in its own.

    Whoever reads what others have just read would be faster there than who has files of his own. A drive does not care.
    """
    with mmap.mmap(-1, _STEP_BYTES) as buffer:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                while os.readv(descriptor, [buffer]) == _STEP_BYTES:
                    pass
            finally:
                os.close(descriptor)
