"""InstantTensor: all files, to the device that it is told. Without a GPU it refuses, which is what is recorded then."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from instanttensor import safe_open

from bench.peers.protocol import Order, serve
from bench.peers.runai import bytes_of


class Instant:
    """Order: ``paths`` and ``warm_paths``; ``device`` (default: cpu)."""

    packages = ("instanttensor",)

    def __init__(self, order: Order) -> None:
        self._order = order
        self._device = order.get("device", "cpu")

    def warm_up(self) -> None:
        self._load(self._order["warm_paths"])

    def load(self) -> dict[str, torch.Tensor]:
        return self._load(self._order["paths"])

    def tensors(self, loaded: dict[str, torch.Tensor]) -> Iterable[tuple[str, memoryview]]:
        return ((name, bytes_of(tensor)) for name, tensor in loaded.items())

    def clear(self) -> None:
        """Nothing is left."""

    def _load(self, paths: list[str]) -> dict[str, torch.Tensor]:
        with safe_open(list(paths), framework="pt", device=self._device) as file:
            tensors = dict(file.tensors())
        if self._device.startswith("cuda"):
            torch.cuda.synchronize()
        return tensors


if __name__ == "__main__":
    serve(Instant)
