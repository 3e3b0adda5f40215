"""The checks, in the order in which they are made. The code of each is imported when it is first run."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable

from cached.cli.doctor.checks import Check, Context, Finding, Group

_Look = Callable[[Context], Iterable[Finding]]


def _in(module: str, function: str) -> _Look:
    """A function of this package by name: importing all of them would slow every ``cached`` command down."""

    def look(context: Context) -> Iterable[Finding]:
        found: _Look = getattr(importlib.import_module(f"cached.cli.doctor.{module}"), function)
        return found(context)

    return look


CHECKS = (
    Check(
        "health", "the daemon answers, and is well", _in("daemon", "daemon"), Group.DAEMON,
        details="asks it five times; degraded reasons, its version, what limits L1 now, other daemons on this host",
    ),
    Check(
        "sockets", "its sockets are open to those who should use them", _in("daemon", "sockets"), Group.DAEMON,
        details="both sockets: mode, group and owner of each folder on the way, as `--as-user` meets them; stale ones",
    ),
    Check(
        "settings", "the settings can be used, and fit this host", _in("daemon", "settings"), Group.DAEMON,
        details="problems of the file; a running daemon with another file; L2 larger than its file "
        "systems; systemd's TimeoutStopSec, MemoryMax, RemoveIPC",
    ),
    Check(
        "catalog", "the catalog can be used", _in("daemon", "catalog"), Group.DAEMON,
        details="parses it, and whether the daemon's user may read it",
    ),
    Check(
        "state", "the state folder is the daemon's alone", _in("daemon", "state"), Group.DAEMON,
        details="exists or can be made, owner, mode",
    ),
    Check(
        "memory", "the host has the memory that L1 is to take", _in("memory", "host_memory"), Group.HOST,
        details="the budget against RAM (80 % and more: advice), what is available, vm.overcommit_memory=2",
    ),
    Check(
        "shared-memory", "the mount has room for L1", _in("memory", "shared_memory"), Group.HOST,
        details="`/dev/shm` against the budget of L1 and what others hold of it; read-only, rights, nosuid",
    ),
    Check(
        "huge-pages", "filling shared memory is fast", _in("memory", "huge_pages"), Group.HOST, experiment=True,
        details="fills 128 MiB of fresh shared memory and the same again, as a mover does; without huge pages, once "
        "more in a tmpfs that has them, where mount namespaces are permitted",
    ),
    Check(
        "segments", "no memory is held by daemons that are gone", _in("memory", "segments"), Group.HOST,
        details="segments by daemon: of this one, of others that answer, of none any more; what a killed measurement "
        "left",
    ),
    Check(
        "memory-cgroup", "the memory cgroup leaves L1 its budget", _in("bounds", "memory_cgroup"), Group.HOST,
        details="versions 1 and 2, every level up to the root: limit and memory.high against L1 and 1 GiB for the "
        "daemon, shared memory that is charged already",
    ),
    Check(
        "swap", "shared memory is not swapped out", _in("bounds", "swap"), Group.HOST,
        details="swap areas, noswap, the cgroup's own limit of swap",
    ),
    Check(
        "pressure", "the host is not short of anything", _in("bounds", "pressure"), Group.HOST,
        details="pressure stall information of memory, disk and processors",
    ),
    Check(
        "processors", "the movers have processors", _in("bounds", "processors"), Group.HOST,
        details="the CPU quota of the cgroup, and affinity, against the number of movers",
    ),
    Check(
        "limits", "the process's limits are high enough", _in("bounds", "process_limits"), Group.HOST,
        details="open files, locked memory, processes and threads: of the running daemon, else of this process",
    ),
    Check(
        "kernel", "the kernel is none that is known to be in the way", _in("bounds", "kernel"), Group.HOST,
        details="older than 5.14, 6.11 to 6.13 with a GPU, without huge pages for shared memory",
    ),
    Check(
        "numa", "shared memory is spread over the nodes", _in("topology", "numa"), Group.HOST,
        details="nodes, their processors and memory, the nodes of GPUs, where shared memory lies, numa_balancing",
    ),
    Check(
        "clock", "the clock is kept right", _in("topology", "clock"), Group.HOST,
        details="what the kernel says of it (adjtimex); how far it is from an origin's is told with that origin",
    ),
    Check(
        "l2", "L2 lies where it should, and has room", _in("storage", "l2"), Group.STORAGE,
        details="file system, drive and its link, free bytes and inodes against the budget, read-only, rights, network "
        "storage, a container's own layer, the root file system, rotating drives, the scheduler, folders on one drive",
    ),
    Check(
        "l2-speed", "L2 is fast", _in("storage", "l2_speed"), Group.STORAGE, experiment=True,
        details="the alignment that O_DIRECT takes; writes up to 256 MiB into a temporary file and reads it, 0.7 s "
        "each, with the code of the movers",
    ),
    Check(
        "origins", "every origin can be reached and read", _in("network", "origins"), Group.NETWORK,
        details="each bucket, host or account of the catalog, of `artifacts.destination` and of `--source`: name and "
        "addresses, connection, certificate, proxy, clock skew; credentials by their source, a listing, a description, "
        "one byte, If-Match, the region, checksums",
    ),
    Check(
        "gpu", "the GPUs' links are as wide as they should be", _in("gpu", "gpu"), Group.GPU,
        details="PCIe generation and width now and at most, NUMA node, BAR1, driver and its persistence, device files. "
        "No GPU is fine",
    ),
    Check(
        "bytecode", "imports need not compile", _in("worker", "bytecode"), Group.WORKER, experiment=True,
        details="imports torch (else numpy, else grpc) with the bytecode that is there and without any; counts modules "
        "that are compiled at every start",
    ),
    Check(
        "threads", "as many threads as processors", _in("worker", "threads"), Group.WORKER, experiment=True,
        details="multiplies matrices with as many threads as a worker takes by itself, and with as many as its "
        "affinity and CPU quota give",
    ),
    Check(
        "cuda-modules", "how CUDA loads its kernels", _in("worker", "cuda_modules"), Group.WORKER, experiment=True,
        details="first kernel after `CUDA_MODULE_LOADING=LAZY`, `EAGER`, and as it is. Without a GPU: not measured",
    ),
    Check(
        "hub", "nothing waits for a hub that is not there", _in("worker", "hub"), Group.WORKER, experiment=True,
        details="looks the Hugging Face hub up and connects, unless `HF_HUB_OFFLINE` says that nobody asks",
    ),
)  # fmt: skip
