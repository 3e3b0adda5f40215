"""How workers start on this host: advice on their environment, each piece by an experiment, none by belief."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator

from cached.cli.doctor.bounds import processors_allowed
from cached.cli.doctor.checks import Context, Finding, Verdict
from cached.cli.doctor.child import run_child

_WORTH = 1.1
"""A tenth faster: below that it is noise."""

_IMPORT = """
import json, sys, time
from importlib.util import cache_from_source, find_spec
name = next((name for name in ("torch", "numpy", "grpc") if find_spec(name)), "asyncio")
began = time.perf_counter()
__import__(name)
seconds = time.perf_counter() - began
import os
sources = [str(module.__spec__.origin) for module in list(sys.modules.values())
           if getattr(getattr(module, "__spec__", None), "origin", None)]
sources = [path for path in sources if path.endswith(".py")]
missing = [path for path in sources if not os.path.exists(cache_from_source(path))]
print(json.dumps({"name": name, "seconds": seconds, "modules": len(sources), "missing": len(missing),
                  "folder": os.path.commonpath(missing) if missing else ""}))
"""


def bytecode(context: Context) -> Iterator[Finding]:
    """Imports what workers import with the bytecode that is there, and again without any."""
    reading = {"PYTHONDONTWRITEBYTECODE": "1"}  # the experiment is not to mend what it looks at
    run_child(context, _IMPORT, environment=reading)  # the files are in the page cache from here on
    found = min((run_child(context, _IMPORT, environment=reading) for _ in range(2)), key=lambda run: run["seconds"])
    with tempfile.TemporaryDirectory() as empty:
        without = run_child(context, _IMPORT, environment={**reading, "PYTHONPYCACHEPREFIX": empty})
    name, missing, modules = found["name"], found["missing"], found["modules"]
    measured = {"import_s": found["seconds"], "import_without_bytecode_s": without["seconds"]}
    figures = f"import {name} takes {found['seconds']:.2f} s, and {without['seconds']:.2f} s without any bytecode"
    if missing * 20 <= modules:
        yield Finding(Verdict.OK, figures, measured)
        return
    compiled = f"{missing} of {modules} modules are compiled at every start, or were never imported before"
    mend = f"{context.python} -m compileall -q {found['folder']}"
    if context.environment.get("PYTHONDONTWRITEBYTECODE"):
        mend += "  # PYTHONDONTWRITEBYTECODE keeps Python from doing so by itself"
    yield Finding(Verdict.ADVICE, f"{compiled}: {figures}", {**measured, "missing_modules": float(missing)}, mend)


_MULTIPLY = """
import json, sys, time
from importlib.util import find_spec
size = 1024
if find_spec("torch"):
    import torch
    threads = torch.get_num_threads()
    a = torch.rand(size, size)
    def multiply(): a @ a
elif find_spec("numpy"):
    import numpy
    threads = 0
    a = numpy.random.default_rng(1).random((size, size), dtype=numpy.float32)
    def multiply(): a @ a
else:
    print(json.dumps({"threads": -1})); sys.exit()
times = []
for _ in range(30):
    began = time.perf_counter()
    multiply()
    times.append(time.perf_counter() - began)
print(json.dumps({"threads": threads, "seconds": sorted(times)[len(times) // 2]}))
"""


def threads(context: Context) -> Iterator[Finding]:
    """Multiplies matrices with as many threads as a worker takes by itself, and with as many as it has processors."""
    allowed = max(1, math.ceil(processors_allowed(context)))
    found = run_child(context, _MULTIPLY)
    if found["threads"] < 0:
        yield Finding(Verdict.NOT_MEASURED, f"{context.python} has neither torch nor numpy")
        return
    fitting = run_child(context, _MULTIPLY, environment={"OMP_NUM_THREADS": str(allowed), "OPENBLAS_NUM_THREADS": None})
    measured = {
        "processors": float(allowed),
        "threads": float(found["threads"]),
        "multiply_ms": 1000 * found["seconds"],
        "multiply_with_as_many_ms": 1000 * fitting["seconds"],
    }
    figures = (
        f"a matrix product takes {1000 * found['seconds']:.1f} ms as it is{_taken(found['threads'])}, "
        f"{1000 * fitting['seconds']:.1f} ms with a thread for each of the {allowed} processors this process may use"
    )
    if found["seconds"] > _WORTH * fitting["seconds"] and found["threads"] != allowed:
        yield Finding(Verdict.ADVICE, figures, measured, f"export OMP_NUM_THREADS={allowed}")
    else:
        yield Finding(Verdict.OK, figures, measured)


def _taken(threads: int) -> str:
    return f", on {threads} threads" if threads else ""


_CUDA = """
import json, time
from importlib.util import find_spec
if not find_spec("torch"):
    print(json.dumps({"gpu": ""})); raise SystemExit
import torch
if not torch.cuda.is_available():
    print(json.dumps({"gpu": ""})); raise SystemExit
began = time.perf_counter()
torch.zeros(1, device="cuda").add_(1)
torch.cuda.synchronize()
print(json.dumps({"gpu": torch.cuda.get_device_name(), "seconds": time.perf_counter() - began}))
"""


def cuda_modules(context: Context) -> Iterator[Finding]:
    """Makes a CUDA context and runs a kernel, with kernels loaded when they are used and all at once."""
    found = run_child(context, _CUDA)
    if not found["gpu"]:
        yield Finding(Verdict.NOT_MEASURED, f"no GPU that the torch of {context.python} can use")
        return
    times_s = {
        mode: min(run_child(context, _CUDA, environment={"CUDA_MODULE_LOADING": mode})["seconds"] for _ in range(2))
        for mode in ("LAZY", "EAGER")
    }
    now_s = min(found["seconds"], run_child(context, _CUDA)["seconds"])
    measured = {"cuda_init_s": now_s, "lazy_s": times_s["LAZY"], "eager_s": times_s["EAGER"]}
    figures = (
        f"the first kernel on {found['gpu']} runs after {now_s:.2f} s as it is, "
        f"{times_s['LAZY']:.2f} s with CUDA_MODULE_LOADING=LAZY, {times_s['EAGER']:.2f} s with EAGER"
    )
    best = min(times_s, key=lambda mode: times_s[mode])
    if now_s > _WORTH * times_s[best]:
        yield Finding(Verdict.ADVICE, figures, measured, f"export CUDA_MODULE_LOADING={best}")
    else:
        yield Finding(Verdict.OK, figures, measured)


_HUB = """
import json, socket, sys, time
from importlib.util import find_spec
from urllib.parse import urlsplit
if not find_spec("huggingface_hub"):
    print(json.dumps({"installed": False})); raise SystemExit
place = urlsplit(sys.argv[1])
began = time.perf_counter()
error = ""
try:
    socket.create_connection((place.hostname, place.port or (443 if place.scheme == "https" else 80)), 10).close()
except OSError as failure:
    error = str(failure)
print(json.dumps({"installed": True, "seconds": time.perf_counter() - began, "error": error}))
"""
_ON = frozenset({"1", "ON", "YES", "TRUE"})
"""What huggingface_hub takes for yes, in its constants.py."""


def hub(context: Context) -> Iterator[Finding]:
    """Looks the Hugging Face hub up and connects, as libraries do unless they are told to stay offline."""
    endpoint = context.environment.get("HF_ENDPOINT", "https://huggingface.co")
    found = run_child(context, _HUB, (endpoint,))
    if not found["installed"]:
        yield Finding(Verdict.OK, f"{context.python} has no huggingface_hub: nothing asks {endpoint}")
        return
    measured = {"connect_s": found["seconds"]}
    figures = f"{endpoint} was not reached after {found['seconds']:.2f} s ({found['error']})"
    if not found["error"]:
        figures = f"{endpoint} is reached in {found['seconds']:.2f} s"
    if context.environment.get("HF_HUB_OFFLINE", "").upper() in _ON:
        yield Finding(Verdict.OK, f"HF_HUB_OFFLINE is set, so nothing asks; {figures}", measured)
    elif found["error"]:
        told = f"{figures}: whatever names a model of the hub waits for that, for each file and each retry"
        yield Finding(Verdict.ADVICE, told, measured, "export HF_HUB_OFFLINE=1")
    else:
        yield Finding(Verdict.OK, figures, measured)
