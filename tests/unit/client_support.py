"""What the client's tests share: contents of models, and waiting for a condition."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save


def two_shards() -> tuple[dict[str, bytes], dict[str, torch.Tensor]]:
    """A sharded model in the usual layout, and its tensors."""
    generator = torch.Generator().manual_seed(7)
    tensors = {f"layer.{index}.weight": torch.randn(64, 33, generator=generator) for index in range(6)}
    tensors["layer.5.bias"] = torch.randn(3, generator=generator).to(torch.bfloat16)
    shards = {
        "model-00001-of-00002.safetensors": dict(list(tensors.items())[:3]),
        "model-00002-of-00002.safetensors": dict(list(tensors.items())[3:]),
    }
    weight_map = {name: path for path, part in shards.items() for name in part}
    files = {
        "config.json": b'{"model_type": "test"}',
        "model.safetensors.index.json": json.dumps({"metadata": {}, "weight_map": weight_map}).encode(),
        "empty.txt": b"",
        **{path: save(part, metadata={"format": "pt"}) for path, part in shards.items()},
    }
    return files, tensors


def eventually(condition, what: str, timeout_s: float = 20.0):
    """Waits until ``condition`` holds, and returns what it answered."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {timeout_s} s")
        time.sleep(0.01)
    return answer


@contextmanager
def without_rights() -> Iterator[None]:
    """The modes of files count for this process meanwhile, also if it is root's."""
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(uid)
