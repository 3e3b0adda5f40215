"""safetensors ``load_file``: every file into CPU tensors, one file after the other, as engines do by default.

It maps the files: so one byte of each page is read, or nothing would have been loaded by the end of the measured run.
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from bench.peers.protocol import serve
from bench.peers.tensors import Tensors, TensorsPeer

_PAGE_BYTES = 4096


class LoadFile(TensorsPeer):
    """See TensorsPeer; always to the CPU."""

    packages = ("safetensors",)

    def read(self, paths: list[str]) -> Tensors:
        tensors: Tensors = {}
        for path in paths:
            tensors |= load_file(path)
        for tensor in tensors.values():
            tensor.flatten().view(torch.uint8)[::_PAGE_BYTES].max()
        return tensors


if __name__ == "__main__":
    serve(LoadFile)
