"""fastsafetensors: all files at once into CPU memory, by its reader that needs no GPU (``nogds``)."""

from __future__ import annotations

from typing import Any

from fastsafetensors import SafeTensorsFileLoader, SingleGroup

from bench.peers.protocol import serve
from bench.peers.tensors import Tensors, TensorsPeer


class _Owned(Tensors):
    """Tensors together with the buffers that own their memory."""

    buffers: Any


class FastSafetensors(TensorsPeer):
    """See TensorsPeer."""

    packages = ("fastsafetensors",)

    def read(self, paths: list[str]) -> Tensors:
        loader = SafeTensorsFileLoader(SingleGroup(), device=self.device, nogds=True)
        loader.add_filenames({0: paths})
        buffers = loader.copy_files_to_device()
        tensors = _Owned((name, buffers.get_tensor(name)) for name in loader.get_keys())
        tensors.buffers = buffers
        return tensors


if __name__ == "__main__":
    serve(FastSafetensors)
