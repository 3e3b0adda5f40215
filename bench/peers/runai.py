"""runai-model-streamer: safetensors files from S3, or from disk, into CPU tensors that stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from runai_model_streamer import SafetensorsStreamer

from bench.peers.protocol import Order, serve


class Runai:
    """Order: ``paths`` and ``warm_paths``: URIs or file names; ``device`` (default: cpu). Settings: environment."""

    packages = ("runai-model-streamer",)

    def __init__(self, order: Order) -> None:
        self._order = order
        self._device = order.get("device", "cpu")

    def warm_up(self) -> None:
        self._stream(self._order["warm_paths"])

    def load(self) -> dict[str, torch.Tensor]:
        return self._stream(self._order["paths"])

    def tensors(self, loaded: dict[str, torch.Tensor]) -> Iterable[tuple[str, memoryview]]:
        return ((name, bytes_of(tensor)) for name, tensor in loaded.items())

    def clear(self) -> None:
        """Nothing is left."""

    def _stream(self, paths: list[str]) -> dict[str, torch.Tensor]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(paths, device=self._device)
            return dict(streamer.get_tensors())


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes, copied from its device if it is not on the CPU."""
    flat: Any = tensor.detach().contiguous().flatten().view(torch.uint8).cpu()
    return memoryview(flat.numpy())


if __name__ == "__main__":
    serve(Runai)
