"""safetensors ``load_file``: every file into CPU tensors, one file after the other, as engines do by default.

It maps the files: so one byte of each page is read, or nothing would have been loaded by the end of the measured run.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from safetensors.torch import load_file

from bench.peers.protocol import Order, serve
from bench.peers.runai import bytes_of

_PAGE_BYTES = 4096


class LoadFile:
    """Order: ``paths`` and ``warm_paths``."""

    packages = ("safetensors",)

    def __init__(self, order: Order) -> None:
        self._order = order

    def warm_up(self) -> None:
        self._load(self._order["warm_paths"])

    def load(self) -> dict[str, torch.Tensor]:
        return self._load(self._order["paths"])

    def tensors(self, loaded: dict[str, torch.Tensor]) -> Iterable[tuple[str, memoryview]]:
        return ((name, bytes_of(tensor)) for name, tensor in loaded.items())

    def clear(self) -> None:
        """Nothing is left."""

    def _load(self, paths: list[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            tensors |= load_file(path)
        for tensor in tensors.values():
            tensor.flatten().view(torch.uint8)[::_PAGE_BYTES].max()
        return tensors


if __name__ == "__main__":
    serve(LoadFile)
