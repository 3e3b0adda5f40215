"""The limit of memory → GPU: the files lie in pinned memory already, and go to the device in copies of 64 MiB."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from bench.peers.fingerprint import tensors_of
from bench.peers.protocol import Order, serve

_COPY_BYTES = 64 << 20


class Pinned:
    """Order: ``paths``, ``warm_paths``, ``device``. Pinning and reading are not measured, nor is allocating there."""

    packages = ("torch",)

    def __init__(self, order: Order) -> None:
        self._device = order["device"]
        self._host = [_pinned(Path(path)) for path in order["paths"]]
        self._there = [torch.empty_like(host, device=self._device) for host in self._host]

    def warm_up(self) -> None:
        self.load()

    def load(self) -> list[torch.Tensor]:
        for host, there in zip(self._host, self._there, strict=True):
            for begin in range(0, len(host), _COPY_BYTES):
                there[begin : begin + _COPY_BYTES].copy_(host[begin : begin + _COPY_BYTES], non_blocking=True)
        torch.cuda.synchronize()
        return self._there

    def tensors(self, loaded: list[torch.Tensor]) -> Iterable[tuple[str, memoryview]]:
        for there in loaded:
            yield from tensors_of(memoryview(there.cpu().numpy()))

    def clear(self) -> None:
        """Nothing is left."""


def _pinned(path: Path) -> torch.Tensor:
    host = torch.empty(path.stat().st_size, dtype=torch.uint8, pin_memory=True)
    with path.open("rb") as file:
        file.readinto(memoryview(host.numpy()))
    return host


if __name__ == "__main__":
    serve(Pinned)
