"""What peers share that read safetensors files into tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from bench.peers.protocol import Order

Tensors = dict[str, torch.Tensor]


class TensorsPeer:
    """A `Loader` of which only ``read`` differs.

    Order: ``paths`` and ``warm_paths`` (file names, or URIs where the peer knows them); ``device`` (default: cpu).
    """

    packages: ClassVar[tuple[str, ...]]

    def __init__(self, order: Order) -> None:
        self.device: str = order.get("device", "cpu")
        self._order = order

    def read(self, paths: list[str]) -> Tensors:
        """All tensors of these files. What owns their memory must live as long as what is returned."""
        raise NotImplementedError

    def warm_up(self) -> None:
        self.read(self._order["warm_paths"])

    def load(self) -> Tensors:
        return self.read(self._order["paths"])

    def tensors(self, loaded: Tensors) -> Iterable[tuple[str, memoryview]]:
        return ((name, _bytes_of(tensor)) for name, tensor in loaded.items())

    def clear(self) -> None:
        """Nothing is left."""


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, copied from its device if it is not on the CPU."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    return memoryview(flat.numpy())
