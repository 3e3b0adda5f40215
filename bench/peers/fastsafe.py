"""fastsafetensors: all files at once into CPU memory, by its reader that needs no GPU (``nogds``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from fastsafetensors import SafeTensorsFileLoader, SingleGroup

from bench.peers.protocol import Order, serve
from bench.peers.runai import bytes_of


class FastSafetensors:
    """Order: ``paths`` and ``warm_paths``; ``device`` (default: cpu)."""

    packages = ("fastsafetensors",)

    def __init__(self, order: Order) -> None:
        self._order = order
        self._device = order.get("device", "cpu")

    def warm_up(self) -> None:
        self._load(self._order["warm_paths"])

    def load(self) -> tuple[Any, dict[str, torch.Tensor]]:
        return self._load(self._order["paths"])

    def tensors(self, loaded: tuple[Any, dict[str, torch.Tensor]]) -> Iterable[tuple[str, memoryview]]:
        return ((name, bytes_of(tensor)) for name, tensor in loaded[1].items())

    def clear(self) -> None:
        """Nothing is left."""

    def _load(self, paths: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
        """The buffers, which own the tensors' memory, and the tensors."""
        loader = SafeTensorsFileLoader(SingleGroup(), device=self._device, nogds=True)
        loader.add_filenames({0: paths})
        buffers = loader.copy_files_to_device()
        return buffers, {name: buffers.get_tensor(name) for name in loader.get_keys()}


if __name__ == "__main__":
    serve(FastSafetensors)
