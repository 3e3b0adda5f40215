"""Warm attach → tensors usable on the CPU: a model in memory until a worker holds all of it as a state dict.

The time must not grow with the model's bytes: the dense models have the same 300 tensors in three sizes. What it does
grow with is the number of tensors, so one model has 10,240. The peers read the same files, which the page cache holds,
or a tmpfs. All contestants end with tensors that are windows on memory; nobody's bytes are touched. There is no limit
to compare with but the interpreter's own cost of making an object for each tensor.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from pathlib import Path
from shutil import copytree
from typing import Any

from bench.checkpoints import TensorPlan, moe, total_bytes
from bench.cpu import wait_idle
from bench.options import Options
from bench.peers.fingerprint import fingerprint_of_files
from bench.results import Cell, FigureTable, PartResult, Requirement
from bench.worker import Worker
from tests.integration.harness import DaemonProcess

TITLE = "Warm attach → tensors usable on the CPU"

_DENSE_TENSORS, _MOE_TENSORS = 300, 10_240
_FACTORS = (1, 4, 16)
_TIMES = 5
_HEADS = ["contestant", "p50 ms", "p99 ms", "least ms", "attach() alone, p50 ms", "with connect(), p50 ms", "loads"]


@dataclass(slots=True)
class _Entrant:
    name: str
    title: str
    worker: Worker
    content: dict[str, object]
    loads: list[dict[str, float]] = field(default_factory=list)
    reason: str = ""

    def ms(self, part: str, share: float = 0.5) -> float | None:
        """A quantile of what was measured."""
        found = sorted(load[part] for load in self.loads if part in load)
        return found[ceil(share * len(found)) - 1] * 1e3 if found else None

    def row(self) -> list[Cell]:
        if not self.loads:
            return [f"{self.title}: {self.reason}", *[None] * (len(_HEADS) - 1)]
        least = min(load["ready_s"] for load in self.loads) * 1e3
        alone, connected = self.ms("attach_s"), self.ms("with_connect_s")
        return [self.title, self.ms("ready_s"), self.ms("ready_s", 0.99), least, alone, connected, len(self.loads)]


def run(options: Options) -> PartResult:
    """A table for each model; all models are resident in one daemon."""
    sources = _checkpoints(options)
    result = PartResult("warm", TITLE)
    p50: dict[str, float | None] = {}
    with ExitStack() as stack:
        socket = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cached-warm-"))) / "cached.sock"
        settings: dict[str, dict[str, Any]] = {
            "daemon": {"log_level": "info", "socket": str(socket)},
            "l1": {"capacity": "80%"},
            "l2": {"enabled": False},
        }
        models = {name: {"source": f"file://{folder}"} for name, folder in sources.items()}
        daemon = DaemonProcess(options.folder / "daemon", models=models, settings=settings)
        daemon.socket = socket
        stack.enter_context(daemon)
        workers = {
            how: stack.enter_context(
                Worker("ready", {"how": how, "socket": str(socket)}, options.folder / "logs" / f"{how}.log")
            )
            for how in ("cached", "load_file", "safe_open")
        }
        for name, folder in sources.items():
            table, p50[name] = _measure(options, workers, daemon, name, folder)
            result.tables.append(table)
    result.requirements = _requirements(p50)
    return result


def _requirements(p50: dict[str, float | None]) -> list[Requirement]:
    dense = [p50[f"dense-x{factor}"] for factor in _FACTORS]
    known = [value for value in dense if value is not None]
    most = max(known) if len(known) == len(dense) else None
    growth = known[-1] / known[0] if most is not None else None
    return [
        Requirement(
            f"attach → state_dict, {_DENSE_TENSORS} tensors, p50, slowest of three sizes", most, 10, False, "ms"
        ),
        Requirement(f"attach → state_dict, {_MOE_TENSORS} tensors, p50", p50["moe"], 40, False, "ms"),
        Requirement("16 times the bytes, to once the bytes, p50", growth, 1.25, False, "×"),
    ]


def _checkpoints(options: Options) -> dict[str, Path]:
    dense_bytes = options.size_bytes // 16
    found = {
        f"dense-x{factor}": options.checkpoints.get(
            f"dense-x{factor}", size_bytes=dense_bytes * factor, shard_bytes=dense_bytes * factor // 4, kind=_dense
        )
        for factor in _FACTORS
    }
    size_bytes = options.size_bytes // 4
    kind = partial(moe, tensor_count=_MOE_TENSORS)
    found["moe"] = options.checkpoints.get("moe", size_bytes=size_bytes, shard_bytes=size_bytes // 16, kind=kind)
    return found


def _dense(size_bytes: int) -> Iterator[TensorPlan]:
    """The same tensors for any size; only their rows grow."""
    columns = 1024
    rows = max(1, size_bytes // (_DENSE_TENSORS * columns * 2))
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "norm")
    for number in range(_DENSE_TENSORS):
        layer, part = divmod(number, len(parts))
        yield TensorPlan(f"model.layers.{layer}.{parts[part]}.weight", (rows, columns))


def _measure(
    options: Options, workers: dict[str, Worker], daemon: DaemonProcess, name: str, folder: Path
) -> tuple[FigureTable, float | None]:
    with ExitStack() as stack:
        fast = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cached-bench-", dir="/dev/shm")))
        copytree(folder, fast, dirs_exist_ok=True)
        entrants = [item for item in _entrants(workers, name, folder, fast) if options.wants(item.name)]
        _check(entrants, sorted(folder.glob("*.safetensors")))
        wait_idle(daemon.pid)
        for number in range(options.rounds):
            start = number % max(1, len(entrants))
            for entrant in [*entrants[start:], *entrants[:start]]:
                if not entrant.reason:
                    _take_turn(entrant)
        count = _DENSE_TENSORS if name != "moe" else _MOE_TENSORS
        size_mb = total_bytes(folder, "*.safetensors") / 1e6
        title = f"{name}: {count} tensors, {size_mb:,.0f} MB, until all are usable"
        for entrant in entrants:
            options.console.print(f"  {name:<10} {entrant.title:<44} {_shown(entrant)}")
        ours = next((entrant.ms("ready_s") for entrant in entrants if entrant.name == "cached"), None)
        return FigureTable(name, title, _HEADS, [entrant.row() for entrant in entrants]), ours


def _entrants(workers: dict[str, Worker], name: str, folder: Path, fast: Path) -> Iterator[_Entrant]:
    yield _Entrant("cached", "cached: attach() → state_dict()", workers["cached"], {"model": name})
    for how, words in (("load_file", "safetensors load_file"), ("safe_open", "safetensors safe_open, get_tensor")):
        for place, at in (("page cache", folder), ("tmpfs", fast)):
            paths = [str(path) for path in sorted(at.glob("*.safetensors"))]
            title = f"{words}, {place}"
            yield _Entrant(f"{how}-{place.replace(' ', '-')}", title, workers[how], {"paths": paths})


def _check(entrants: Sequence[_Entrant], paths: Sequence[Path]) -> None:
    """Each loads once, so that all is warm, and what it loaded is compared with the files."""
    expected = fingerprint_of_files(paths, full=True)
    for entrant in entrants:
        try:
            if entrant.worker.ask(check=True, **entrant.content)["fingerprint"] != expected:
                entrant.reason = "failed: what it loaded is not the checkpoint"
        except RuntimeError as error:
            entrant.reason = f"failed: {error}"


def _take_turn(entrant: _Entrant) -> None:
    try:
        entrant.loads += entrant.worker.ask(times=_TIMES, **entrant.content)["seconds"]
    except RuntimeError as error:
        entrant.reason = f"failed: {error}"


def _shown(entrant: _Entrant) -> str:
    if not entrant.loads:
        return entrant.reason
    return f"{statistics.median(load['ready_s'] for load in entrant.loads) * 1e3:8.2f} ms"
