"""A worker that compiles: restores its compile cache, compiles a small module with inductor, and prints how that went.

``python -m bench.compile_worker SOCKET DIRECTORY [--no-cache]``. Ends with one line of JSON: seconds from the start of
the process's own code to each moment, and inductor's counters of hits and misses.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import cached_client
from cached_client import artifacts


def main() -> None:
    began_s = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("socket")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--no-cache", action="store_true", help="neither restore nor save")
    parser.add_argument("--revision", default="1", help="of the model, a part of the key")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        session = None
        if arguments.no_cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(arguments.directory / "inductor")
        else:
            cache = stack.enter_context(cached_client.connect(arguments.socket))
            session = stack.enter_context(
                artifacts.compile_cache(
                    cache, model="bench-mlp", revision=arguments.revision, engine="torch", device="cpu",
                    directory=arguments.directory, set_environment=True, strict=True,
                )
            )  # fmt: skip
        restored_s = time.perf_counter() - began_s
        told = compiled(began_s)
    answer = {"restore_s": restored_s, **told, "restored": "", "saved": ""}
    if session is not None:
        answer["restored"] = type(session.restored).__name__
        answer["saved"] = session.saved.outcome if session.saved else ""
        answer["archive_bytes"] = session.saved.size_bytes if session.saved else 0
    print(json.dumps(answer))


def compiled(began_s: float) -> dict[str, Any]:
    """Imports torch, compiles, runs once, and compares with what the module says uncompiled."""
    import torch
    from torch._dynamo.utils import counters

    imported_s = time.perf_counter() - began_s
    torch.manual_seed(0)
    torch.set_num_threads(1)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)
            self.norm = torch.nn.LayerNorm(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x)))).softmax(-1) * x.sin()

    module = Block().eval()
    example = torch.randn(4, 64)
    with torch.no_grad():
        expected = module(example)
        ready_s = time.perf_counter() - began_s
        found = torch.compile(module)(example)
    total_s = time.perf_counter() - began_s
    inductor = {str(name): int(count) for name, count in counters["inductor"].items()}
    return {
        "import_s": imported_s,
        "compile_s": total_s - ready_s,
        "total_s": total_s,
        "equal": bool(torch.allclose(expected, found, atol=1e-5)),
        "hits": inductor.get("fxgraph_cache_hit", 0),
        "misses": inductor.get("fxgraph_cache_miss", 0),
    }


if __name__ == "__main__":
    main()
