"""InstantTensor: all files, to the device that it is told. Without a GPU it refuses, which is what is recorded then."""

from __future__ import annotations

import torch
from instanttensor import safe_open

from bench.peers.protocol import serve
from bench.peers.tensors import Tensors, TensorsPeer


class Instant(TensorsPeer):
    """See TensorsPeer."""

    packages = ("instanttensor",)

    def read(self, paths: list[str]) -> Tensors:
        with safe_open(list(paths), framework="pt", device=self.device) as file:
            tensors = dict(file.tensors())
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return tensors


if __name__ == "__main__":
    serve(Instant)
