"""Control plane: how soon the daemon answers idle, under a pull at full speed, with 1,000 leases; what idling costs.

One process asks in turn, with pauses: List; a warm Attach, until its first message; attach() of the client, until the
model is mapped, which takes one more round trip and several threads. Under load another process has a model pulled from
the S3 server of this machine, again and again, so that movers and server keep all cores busy; L2 is on, so the disk is
written too. The limit is a call that needs no work, to a server of the same gRPC library in a process beside: what the
library and the scheduler take of each. The daemon has the priority that its systemd unit gives it.
The idle daemon has all its default parts, its web page too; its processor time is what the kernel accounted to its
threads, and its memory is that of the process with all its children.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from bench.checkpoints import Checkpoints
from bench.contest import touch_and_free
from bench.cpu import wait_idle
from bench.options import Options
from bench.results import Cell, FigureTable, PartResult, Requirement
from bench.site import Site, unit_command
from bench.worker import Worker
from cached_client._proto import cached_pb2 as pb
from tests.integration.harness import PAGES, DaemonProcess, wait_for

TITLE = "Control plane, and the idle daemon"

_LEASES = 1000
_MODELS = 20
_IDLE_S = 30.0
_IDLE_QUICK_S = 3.0
"""Too short for a figure: what the daemon does once in a while is in it or not."""
_BIG = "big"
_ASKED = {
    "bare_s": "a bare call (limit)",
    "list_s": "List",
    "attach_rpc_s": "Attach",
    "attach_s": "attach() until mapped",
}
_HEADS = [
    "state of the daemon",
    *(f"{words} {quantile}" for words in _ASKED.values() for quantile in ("p50 ms", "p99 ms")),
    "of each",
    "pull GB/s",
]
_IDLE_HEADS = ["state", "processes", "RSS MB", "PSS MB", "% of a core", "over s"]


@dataclass(frozen=True, slots=True)
class _State:
    """Answers in one state of the daemon."""

    title: str
    answers: dict[str, list[float]]
    pulled_gb_per_s: float | None = None

    def ms(self, asked: str, share: float) -> float:
        """A quantile, in milliseconds."""
        values = sorted(self.answers[asked])
        return values[ceil(share * len(values)) - 1] * 1e3

    def row(self) -> list[Cell]:
        cells = [self.ms(asked, share) for asked in _ASKED for share in (0.5, 0.99)]
        return [self.title, *cells, len(self.answers["list_s"]), self.pulled_gb_per_s]


def run(options: Options) -> PartResult:
    """A table for the answers, one for the idle daemon."""
    result = PartResult("control", TITLE)
    small = {f"small-{number:02}": _small(options.checkpoints, number) for number in range(_MODELS)}
    with Site(options.folder / "site") as site:
        models: dict[str, Any] = {name: {"source": f"file://{folder}"} for name, folder in small.items()}
        size_bytes = options.size_bytes
        site.push(_BIG, options.checkpoints.get(_BIG, size_bytes=size_bytes, shard_bytes=size_bytes // 4))
        models[_BIG] = site.by_crc(_BIG)
        settings: dict[str, dict[str, Any]] = {"l1": {"capacity": "60%", "pool_bytes": "auto"}}
        daemon = site.daemon("control", models=models, settings=settings, command=unit_command())
        _pull(daemon, list(small))
        states = list(_states(options, daemon, list(small)))
    title = f"Milliseconds until answered; {_MODELS} models resident"
    result.tables.append(FigureTable("answers", title, _HEADS, [state.row() for state in states]))
    idle = _idle(options, {name: {"source": f"file://{folder}"} for name, folder in small.items()})
    result.tables.append(FigureTable("idle", f"The idle daemon; {_MODELS} models resident", _IDLE_HEADS, idle))
    result.requirements = [*_answered_in_time(states), *_idle_costs(idle[-1])]
    return result


def _answered_in_time(states: list[_State]) -> Iterator[Requirement]:
    for state in states:
        for asked, what in (("list_s", "List"), ("attach_rpc_s", "warm Attach")):
            if state.pulled_gb_per_s is not None:
                yield Requirement(f"{what}, {state.title}: p50", state.ms(asked, 0.5), 4, False, "ms")
                yield Requirement(f"{what}, {state.title}: p99", state.ms(asked, 0.99), 60, False, "ms")


def _idle_costs(row: list[Cell]) -> Iterator[Requirement]:
    rss_mb, share, seconds = row[2], row[4], row[5]
    assert isinstance(rss_mb, float)
    assert isinstance(share, float)
    assert isinstance(seconds, float)
    over = f"over {seconds:.0f} s" + ("" if seconds >= _IDLE_S else ", too short for a figure")
    yield Requirement(f"idle daemon with its children, {over}: RSS", rss_mb, 100, False, "MB")
    yield Requirement(f"idle daemon with its children, {over}: share of a core", share, 0.5, False, "%")


def _small(checkpoints: Checkpoints, number: int) -> Path:
    return checkpoints.get(f"small-{number:02}", size_bytes=4 << 20, shard_bytes=1 << 20)


def _pull(daemon: DaemonProcess, names: list[str]) -> None:
    with daemon.stub() as stub:
        for name in names:
            for _ in stub.Pull(pb.PullRequest(ref=name)):
                pass
        wait_for(lambda: not stub.Stats(pb.StatsRequest()).active_load_count, "no load")
    wait_idle(daemon.pid)


def _states(options: Options, daemon: DaemonProcess, names: list[str]) -> Iterator[_State]:
    seconds = 1.5 if options.quick else 16.0
    socket = str(daemon.socket)
    with ExitStack() as stack:

        def worker(role: str, **order: Any) -> Worker:
            log = options.folder / "logs" / f"{role}.log"
            return stack.enter_context(Worker("control", {"socket": socket, "role": role, **order}, log))

        bare = str(options.folder / "bare.sock")
        worker("bare", socket=bare).ask(within_s=10)
        asker, puller = worker("ask", models=names, bare=bare), worker("pull", model=_BIG)
        asker.ask(for_s=0.5)
        for held in ("", f"{_LEASES} leases held"):
            if held:
                worker("hold", models=names).ask(leases=_LEASES)
            yield _measure(options, held or "idle", asker, seconds)
            touch_and_free(options.size_bytes * 2)
            puller.ask(do="start")
            state = _measure(options, f"{held}, pulling" if held else "pulling", asker, seconds)
            pulled = puller.ask(do="stop")
            yield _State(state.title, state.answers, pulled["pulled_bytes"] / 1e9 / pulled["seconds"])
            wait_idle(daemon.pid)


def _measure(options: Options, title: str, asker: Worker, seconds: float) -> _State:
    state = _State(title, asker.ask(for_s=seconds))
    shown = "  ".join(
        f"{words} {state.ms(asked, 0.5):.2f}/{state.ms(asked, 0.99):.1f} ms" for asked, words in _ASKED.items()
    )
    options.console.print(f"  {title:<28} p50/p99  {shown}")
    return state


def _idle(options: Options, models: dict[str, Any]) -> list[list[Cell]]:
    """The state just after loads, with idle movers, and that which it settles in."""
    seconds = _IDLE_QUICK_S if options.quick else _IDLE_S
    settings: dict[str, dict[str, Any]] = {
        "daemon": {"log_level": "info"}, "l1": {"capacity": "60%", "pool_bytes": "auto"},
        "transfer": {"movers": 0, "idle_timeout_s": seconds + 5}, **PAGES,
    }  # fmt: skip
    with DaemonProcess(options.folder / "idle", models=models, settings=settings) as daemon:
        _pull(daemon, list(models))
        with_movers = _cost("just after loads, movers not ended yet", daemon.pid, seconds)
        wait_for(lambda: len(_tree(daemon.pid)) == 1, "no mover is left")
        time.sleep(2)
        return [with_movers, _cost("settled", daemon.pid, seconds)]


def _cost(title: str, pid: int, seconds: float) -> list[Cell]:
    before_s, began_s = _cpu_s(pid), time.monotonic()
    time.sleep(seconds)
    after_s, ended_s = _cpu_s(pid), time.monotonic()
    pids = _tree(pid)
    memory = [Path(f"/proc/{each}/smaps_rollup").read_text() for each in pids]
    rss, pss = (sum(_kib(name, text) for text in memory) * 1024 / 1e6 for name in ("Rss", "Pss"))
    return [title, len(pids), rss, pss, (after_s - before_s) / (ended_s - began_s) * 100, ended_s - began_s]


def _cpu_s(pid: int) -> float:
    """Time on a processor of all threads of a process and its children, to the nanosecond."""
    files = (file for each in _tree(pid) for file in Path(f"/proc/{each}/task").glob("*/schedstat"))
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def _tree(pid: int) -> list[int]:
    parents = {
        int(entry): int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        for entry in os.listdir("/proc")
        if entry.isdigit() and os.path.exists(f"/proc/{entry}/stat")
    }
    found = [pid]
    for each in found:
        found += [child for child, parent in parents.items() if parent == each]
    return found


def _kib(name: str, text: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(match[1]) if match else 0
