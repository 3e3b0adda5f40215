"""safetensors ``load_file`` straight to a device: every file, one tensor after the other, from pageable memory."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from bench.peers.loadfile import LoadFile
from bench.peers.protocol import Order, serve


class LoadFileOnDevice(LoadFile):
    """Order: ``paths``, ``warm_paths``, ``device``."""

    def __init__(self, order: Order) -> None:
        super().__init__(order)
        self._device = order["device"]

    def _load(self, paths: list[str]) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        for path in paths:
            tensors |= load_file(path, device=self._device)
        torch.cuda.synchronize()
        return tensors


if __name__ == "__main__":
    serve(LoadFileOnDevice)
