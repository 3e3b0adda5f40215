"""The daemon's own memory, as the C library keeps it. In processes of their own: what they set cannot be taken back."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library cannot be told")

_THREADS = """
import ctypes, sys, threading
from cached import heap

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.fopen.restype = ctypes.c_void_p
if sys.argv[1] == "shared":
    heap.share_one_arena()
at_once = threading.Barrier(5)

def take():
    libc.malloc(ctypes.c_size_t(1000))
    at_once.wait()
    at_once.wait()

threads = [threading.Thread(target=take) for _ in range(4)]
for thread in threads:
    thread.start()
at_once.wait()
answer = ctypes.c_void_p(libc.fopen(sys.argv[2].encode(), b"w"))
libc.malloc_info(0, answer)
libc.fclose(answer)
at_once.wait()
"""

_HOLES = """
import ctypes
from cached import heap

def own_kb():
    with open("/proc/self/smaps_rollup") as rollup:
        return next(int(line.split()[1]) for line in rollup if line.startswith("Anonymous:"))

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(64 << 10))) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 64 << 10)
for block in blocks[:-1]:
    libc.free(block)
kept = own_kb()
heap.trim()
print(kept - own_kb())
"""


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("kind", ["shared", "default"])
def test_threads_take_from_one_arena(tmp_path: Path, kind: str) -> None:
    answer = tmp_path / "info.xml"
    run(_THREADS, kind, str(answer))
    arenas = answer.read_text().count("<heap nr=")
    assert arenas == 1 if kind == "shared" else arenas > 1


def test_free_memory_below_what_is_used_goes_back_to_the_host() -> None:
    """The last of a thousand blocks of 64 KiB stays: the C library by itself would keep what lies below it."""
    assert int(run(_HOLES)) > 50_000
