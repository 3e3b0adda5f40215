"""safetensors ``load_file`` straight to a device: every file, one tensor after the other, from pageable memory."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from bench.peers.protocol import serve
from bench.peers.tensors import Tensors, TensorsPeer


class LoadFileOnDevice(TensorsPeer):
    """See TensorsPeer; the device is a GPU."""

    packages = ("safetensors",)

    def read(self, paths: list[str]) -> Tensors:
        tensors: Tensors = {}
        for path in paths:
            tensors |= load_file(path, device=self.device)
        torch.cuda.synchronize()
        return tensors


if __name__ == "__main__":
    serve(LoadFileOnDevice)
