"""Makes all tensors of a checkpoint that is in memory usable on the CPU: by attaching, or by safetensors.

Order: ``how`` (``cached``, ``load_file`` or ``safe_open``) and ``socket``; each question names ``paths`` of the weight
files, or the ``model``.
Nothing touches the tensors' bytes before the clock stops, whoever made them: all contestants map memory that is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import safetensors
import safetensors.torch
import torch

import cached_client
import cached_client.torch
from bench.peers.fingerprint import fingerprint
from bench.peers.lines import Order, answer_lines
from cached_client.attach import Model

Tensors = dict[str, torch.Tensor]


class Ready:
    """Asked for ``times`` loads, it answers their seconds; asked to ``check``, the fingerprint of what it loads."""

    def __init__(self, order: Order) -> None:
        self._socket: str = order.get("socket", "")
        self._asked: Order = {}
        how = order["how"]
        load: dict[str, Callable[[ExitStack], tuple[Tensors, dict[str, float]]]] = {
            "cached": self._attach, "load_file": self._load_file, "safe_open": self._safe_open,
        }  # fmt: skip
        self._load = load[how]
        self._cache = cached_client.connect(self._socket) if how == "cached" else None
        if self._cache is not None:
            self._cache.wait_ready(30)

    def __call__(self, asked: Order) -> Order:
        self._asked = asked
        if asked.get("check"):
            with ExitStack() as stack:
                tensors, _ = self._load(stack)
                views = ((name, _bytes_of(tensor)) for name, tensor in tensors.items())
                return {"fingerprint": fingerprint(views, full=True), "tensors": len(tensors)}
        return {"seconds": [self._timed() for _ in range(asked["times"])]}

    def _timed(self) -> dict[str, float]:
        with ExitStack() as stack:
            began_s = time.perf_counter()
            tensors, parts = self._load(stack)
            ready_s = time.perf_counter() - began_s
            del tensors
        found = {"ready_s": ready_s, **parts}
        if self._cache is not None:
            found["with_connect_s"] = self._connect_and_attach()
        return found

    def _attach(self, stack: ExitStack) -> tuple[Tensors, dict[str, float]]:
        assert self._cache is not None
        began_s = time.perf_counter()
        model: Model = stack.enter_context(self._cache.attach(self._asked["model"]))
        attach_s = time.perf_counter() - began_s
        return model.state_dict(), {"attach_s": attach_s}

    def _connect_and_attach(self) -> float:
        began_s = time.perf_counter()
        with cached_client.connect(self._socket) as cache, cache.attach(self._asked["model"]) as model:
            tensors = model.state_dict()
            seconds = time.perf_counter() - began_s
            del tensors
        return seconds

    def _load_file(self, _stack: ExitStack) -> tuple[Tensors, dict[str, float]]:
        tensors: Tensors = {}
        for path in self._asked["paths"]:
            tensors |= safetensors.torch.load_file(path)
        return tensors, {}

    def _safe_open(self, _stack: ExitStack) -> tuple[Tensors, dict[str, float]]:
        tensors: Tensors = {}
        for path in self._asked["paths"]:
            opened: Any = safetensors.safe_open(path, framework="pt")
            with opened as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors, {}


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy())


if __name__ == "__main__":
    answer_lines(Ready)
