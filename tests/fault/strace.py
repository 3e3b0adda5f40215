"""System calls of a running daemon, watched, killed at or made to fail by ``strace``: its code knows nothing of it."""

from __future__ import annotations

import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.integration.harness import wait_for
from tests.integration.support import ROOT

_CALL = re.compile(r"^(\d+) +(\w+)\((.*)")
_CGROUP = re.compile(r"(/sys/fs/cgroup)/[^\"]*/")
_HEX = re.compile(r"[0-9a-f]{12,}")
_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"(?:\.\.\.)?')
_LAST_LENGTH = 160


@cache
def _why_not() -> str:
    """Why strace cannot inject here; empty if it can."""
    try:
        probe = subprocess.run(
            ["strace", "-qq", "-o", "/dev/null", "-e", "inject=fsync:error=EIO", "true"],
            capture_output=True, check=False, text=True,
        )  # fmt: skip
    except FileNotFoundError:
        return "needs strace(1)"
    return f"ptrace is not allowed here: {probe.stderr.strip()}" if probe.returncode else ""


def require_strace() -> None:
    """Skips the test where strace is not there, or may not trace."""
    if why := _why_not():
        pytest.skip(why)


@contextmanager
def traced(pid: int, log: Path, *, calls: Sequence[str], inject: str = "") -> Iterator[subprocess.Popen[bytes]]:
    """Traces all threads of a process, and what it starts, from now until the block ends.

    ``inject`` is strace's, such as ``fsync:error=EIO:when=1``; its numbers count in each thread by itself. The log has
    one line for each call; see ``Calls``. Of a process that dies it is whole once the tracer, which is yielded, ended.
    """
    argv = ["strace", "-f", "-qq", "-s", "200", "-o", str(log), "-p", str(pid), "-e", f"trace={','.join(calls)}"]
    if inject:
        argv += ["-e", f"inject={inject}"]
    tracer = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: tracer.poll() is not None or _is_traced(pid, tracer.pid), "strace to hold every thread")
        assert tracer.poll() is None, "strace ended; what it says is above"
        yield tracer
    finally:
        # Not SIGTERM: strace may wait for ever for a thread that began as it attached. The kernel lets go of all.
        tracer.kill()
        tracer.wait()


def wait_until_written(tracer: subprocess.Popen[bytes]) -> None:
    """After the death of what it traced: until its log has the call that was killed at."""
    wait_for(lambda: tracer.poll() is not None, "strace to write down where it killed")


def is_alive(pid: int) -> bool:
    """Whether a process runs. One that is traced may have died long before its parent hears of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except (FileNotFoundError, ProcessLookupError):
        return False


def _is_traced(pid: int, tracer: int) -> bool:
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        return all(f"TracerPid:\t{tracer}\n" in (thread / "status").read_text() for thread in threads)
    except (FileNotFoundError, ProcessLookupError):
        return False  # a thread ended meanwhile


class Calls:
    """What a log of ``traced`` says."""

    def __init__(self, log: Path) -> None:
        self.lines = log.read_text(errors="replace").splitlines() if log.exists() else []

    def reached(self) -> Counter[str]:
        """How far the numbers of ``when=`` go for each call: the most calls that one thread made."""
        counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for line in self.lines:
            if match := _CALL.match(line):
                counts[match[2]][match[1]] += 1
        return Counter({name: max(by_thread.values()) for name, by_thread in counts.items()})

    def last(self, folder: Path) -> str:
        """The last call that was begun, without process, digests, data, ``folder`` and other names that change."""
        begun = [match for line in self.lines if (match := _CALL.match(line))]
        if not begun:
            return ""
        arguments = _TEXT.sub(_named, begun[-1][3].replace(f"{folder}/", "").replace(f"{ROOT}/", ""))
        return _HEX.sub("…", f"{begun[-1][2]}({arguments}")[:_LAST_LENGTH]


def _named(text: re.Match[str]) -> str:
    """A name as it is, without the host's cgroup; data, which strace escapes or cuts, is left out."""
    return '"…"' if "\\" in text[0] or text[0].endswith("...") else _CGROUP.sub(r"\1/…/", text[0])
