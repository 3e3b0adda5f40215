"""The hops to workers: calls and attaches at a daemon, and memory to a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import cached_client
from cached.cli.bench.hop import Expectation, Measured, Outcome, Setting, judged_ms, not_measured
from cached.cli.bench.private import MODEL, PrivateDaemon
from cached.cli.doctor.child import run_python
from cached.cli.doctor.gpu import gpus
from cached.errors import CachedError
from cached.units import MIB
from cached_client._proto import cached_pb2 as pb
from cached_client.connection import Connection
from cached_client.errors import CacheError

_CALLS, _ATTACHES = 100, 10
_TIMEOUT_S = 30.0
_CALL = Expectation(10.0, "4 ms at most (docs/performance.md)")
_ATTACH = Expectation(30.0, "8 ms at most (docs/performance.md)")
_REASONS = "a daemon that is short of processors: a pull at full speed, a CPU quota, a busy host"
_GPU_SHARE = 0.6
_GPU_ABOUT = "shared memory to a GPU, through the client's pinned ring"


def daemon(setting: Setting) -> Iterator[Measured]:
    """Calls and warm attaches: at the running daemon if it has a model in L1, else at one of our own."""
    running = _resident_model(setting.socket)
    try:
        if running:
            yield from _at(setting.socket, running, f"the running daemon ({running})")
        else:
            with PrivateDaemon(_model_bytes(setting), setting.environment) as own:
                yield from _at(own.socket, MODEL, "a daemon of its own")
    except (OSError, CachedError, CacheError) as error:
        told = error.message if isinstance(error, CachedError | CacheError) else str(error)
        yield not_measured("call", "a call to the daemon", told)
        yield not_measured("attach", "a warm attach", told)


def _model_bytes(setting: Setting) -> int:
    return min(setting.size_bytes, 64 * MIB)


def _resident_model(socket: str) -> str:
    """The smallest model that is ready in L1 of the running daemon; empty where there is none."""
    try:
        with Connection(socket) as cache:
            models = cache.call(cache.stub.List, pb.ListRequest(), timeout_s=_TIMEOUT_S).models
    except CacheError:
        return ""
    ready = [item for item in models if item.size_bytes and item.l1_bytes == item.size_bytes and not item.transient]
    return min(ready, key=lambda item: item.size_bytes).name if ready else ""


def _at(socket: str, model: str, where: str) -> Iterator[Measured]:
    calls_ms = []
    with Connection(socket) as connection:
        for _ in range(_CALLS):
            began_s = time.perf_counter()
            connection.call(connection.stub.Stats, pb.StatsRequest(), timeout_s=_TIMEOUT_S)
            calls_ms.append(1000 * (time.perf_counter() - began_s))
    about = f"a call to {where}, median of {_CALLS}"
    yield judged_ms("call", about, statistics.median(calls_ms), _CALL, reasons=_REASONS, check="processors")
    attaches_ms = []
    with cached_client.connect(socket) as cache:
        for _ in range(_ATTACHES):
            began_s = time.perf_counter()
            with cache.attach(model, only_if_resident=True) as attached:
                attached.wait()
                attaches_ms.append(1000 * (time.perf_counter() - began_s))
    about = f"a warm attach at {where}, mapped, median of {_ATTACHES}"
    yield judged_ms("attach", about, statistics.median(attaches_ms), _ATTACH, reasons=_REASONS, check="daemon")


_UPLOAD = """
import json, sys, time
socket, name = sys.argv[1:]
try:
    import torch
except ImportError as error:
    print(json.dumps({"why": f"no torch: {error}"})); raise SystemExit
if not torch.cuda.is_available():
    print(json.dumps({"why": "torch can use no GPU"})); raise SystemExit
import cached_client
times = []
with cached_client.connect(socket) as cache, cache.attach(name) as model:
    model.wait()
    for _ in range(3):
        cpu_s, began_s = time.process_time(), time.perf_counter()
        tensors = model.state_dict(device="cuda:0")
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began_s, time.process_time() - cpu_s))
        del tensors
    report = model.device_report
    size = sum(info.size_bytes for info in model.files.values())
best = min(times)
print(json.dumps({"seconds": best[0], "cpu_s": best[1], "size_bytes": size, "path": report.path,
                  "fallbacks": list(report.fallbacks), "gpu": torch.cuda.get_device_name()}))
"""


def gpu(setting: Setting) -> Iterator[Measured]:
    """A model in shared memory until all of it is on the first GPU; the second time and later, as ranks find it."""
    found = gpus(setting.proc, setting.sys)
    if not found and not (setting.proc / "driver/nvidia/version").exists():
        yield not_measured("gpu", _GPU_ABOUT, "no GPU")
        return
    try:
        with PrivateDaemon(setting.size_bytes, setting.environment) as own:
            answer = run_python(setting.python, _UPLOAD, setting.environment, (own.socket, MODEL))
    except (OSError, ValueError, CachedError, CacheError) as error:
        yield not_measured("gpu", _GPU_ABOUT, str(error))
        return
    if "why" in answer:
        yield not_measured("gpu", _GPU_ABOUT, f"{answer['why']} ({setting.python})")
        return
    link = found[0].link if found else None
    rate = answer["size_bytes"] / 1e9 / answer["seconds"]
    expected = None
    if link is not None and link.max_gb_per_s:
        shown = f"{_GPU_SHARE:.0%} and more of {link}, {link.max_gb_per_s:.0f} GB/s"
        expected = Expectation(_GPU_SHARE * link.max_gb_per_s, shown)
    outcome = Outcome.UNKNOWN
    if expected is not None:
        outcome = Outcome.EXPECTED if rate >= expected.least else Outcome.SLOWER
    fallbacks = "; ".join(answer["fallbacks"])
    yield Measured(
        "gpu", f"shared memory to {answer['gpu']}, path {answer['path']}", outcome, rate, "GB/s",
        answer["cpu_s"] / (answer["size_bytes"] / 1e9), expected, fallbacks,
        "too few processors to fill the ring; the GPU on another NUMA node; 4 KiB pages; a narrow link", "gpu",
        {"size_bytes": float(answer["size_bytes"]), "seconds": answer["seconds"]},
    )  # fmt: skip
