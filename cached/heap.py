"""The own memory of daemon and movers: shared by their threads, rarely searched for garbage, given back when free."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

_M_ARENA_MAX = -8
"""From glibc's malloc.h."""


def share_one_arena() -> None:
    """What one thread frees, every other can use. To be called before there is a second thread.

    By default each new thread takes from a part of the heap of its own, up to eight of them for each core. With a
    thousand leases and 270 operations a second the holes in these grew by a megabyte a minute; one part stays flat.
    """
    mallopt = _libc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


def put_off_the_collector() -> None:
    """What a process builds up at its start stays, and would be looked through again and again. Movers keep it."""
    gc.set_threshold(50_000)


def spare_the_collector() -> None:
    """What is there by now stays; looking through it again and again would hold the loop up.

    With a thousand leases a full collection took 100 ms, found next to nothing, and came with every quarter more of
    them. It comes more rarely now, but not too rarely: gRPC leaves a cycle of five objects for each call, a load some
    hundred, and those that outlive two smaller collections wait for a full one. With a hundred calls and some loads
    a second it comes every five minutes; with 50 instead of 2 the daemon grew by 1 MB in three minutes for two hours.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 2)


def trim() -> None:
    """Gives the host what the C library keeps of freed memory. Blocks, for some milliseconds; for a thread.

    Thousands of leases and calls of all sizes leave holes in it. By itself it gives back only what is free at its end.
    """
    malloc_trim = _libc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _libc(name: str) -> Callable[..., int] | None:
    """None in another C library than glibc."""
    found: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)
    return found
