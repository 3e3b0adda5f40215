"""The daemon's own memory: how often it is searched for garbage, and that the host gets back what it does not need."""

from __future__ import annotations

import ctypes
import gc


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
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library than glibc
        return
    malloc_trim(0)
