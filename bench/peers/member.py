"""One of several workers of a host: attaches when told to, reads every byte, and says how much memory it accounts for.

Order: ``socket`` and ``model``; or ``paths`` of weight files, which it loads with safetensors instead.
"""

from __future__ import annotations

import re
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import cached_client
import cached_client.torch
from bench.peers.lines import Order, answer_lines

_PAGE_BYTES = 4096


class Member:
    """Asked to ``do``: ``load`` (until all tensors are usable), ``read`` (all bytes), ``account`` and ``close``."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._stack = ExitStack()
        self._tensors: dict[str, torch.Tensor] = {}
        self._cache: Any = None
        if "socket" in order:
            self._cache = self._stack.enter_context(cached_client.connect(order["socket"]))
            self._cache.wait_ready(30)
        self._before = _memory()

    def __call__(self, asked: Order) -> Order:
        answer: Order = getattr(self, f"_{asked['do']}")()
        return answer

    def _ready(self) -> Order:
        return {}

    def _load(self) -> Order:
        began_s = time.perf_counter()
        report: Order = {}
        if self._cache is None:
            for path in self._order["paths"]:
                self._tensors |= safetensors.torch.load_file(path)
        else:
            model = self._stack.enter_context(self._cache.attach(self._order["model"]))
            self._tensors = model.state_dict()
            found = model.wait()
            report = {"from_level": found.from_level, "origin_bytes": found.origin_bytes}
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors.values())
        return {"seconds": time.perf_counter() - began_s, "size_bytes": size_bytes, **report}

    def _read(self) -> Order:
        for tensor in self._tensors.values():
            tensor.flatten().view(torch.uint8)[::_PAGE_BYTES].max()
        return {}

    def _account(self) -> Order:
        """Growth since it was connected: of its proportional share of all memory, and of what is its own alone."""
        now = _memory()
        return {name: now[name] - self._before[name] for name in now}

    def _close(self) -> Order:
        self._tensors.clear()
        self._stack.close()
        return {}


def _memory() -> dict[str, int]:
    text = Path("/proc/self/smaps_rollup").read_text()
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(Pss|Rss|Anonymous):\s+(\d+) kB", text, re.MULTILINE)}
    # Not Private_Dirty, which has the pages of a tmpfs file, too, as long as only one process maps them.
    return {"pss_bytes": found["Pss"], "rss_bytes": found["Rss"], "own_bytes": found["Anonymous"]}


if __name__ == "__main__":
    answer_lines(Member)
