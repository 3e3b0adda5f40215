"""Checkpoints that look like real ones: shards with safetensors headers, an index, config and tokenizer files.

Their content is random, so neither compressible nor equal anywhere, and the same again for the same seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

_HIDDEN = 2048
_BLOCK_BYTES = 4 << 20
_DTYPE_BYTES = {"BF16": 2, "F8_E4M3": 1, "F32": 4}
_SMALL_FILES = {"tokenizer_config.json": "{}", "generation_config.json": "{}"}


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "BF16"

    @property
    def size_bytes(self) -> int:
        """Of its data."""
        return prod(self.shape) * _DTYPE_BYTES[self.dtype]


def dense(size_bytes: int) -> Iterator[TensorPlan]:
    """As a Llama: nine tensors a layer, some of them large, two norms tiny; the last one is cut to fit."""
    parts = (
        ("self_attn.q_proj", _HIDDEN), ("self_attn.k_proj", _HIDDEN // 4), ("self_attn.v_proj", _HIDDEN // 4),
        ("self_attn.o_proj", _HIDDEN), ("mlp.gate_proj", 4 * _HIDDEN), ("mlp.up_proj", 4 * _HIDDEN),
        ("mlp.down_proj", 4 * _HIDDEN), ("input_layernorm", 0), ("post_attention_layernorm", 0),
    )  # fmt: skip
    layer = 0
    while True:
        for part, rows in parts:
            shape = (rows, _HIDDEN) if rows else (_HIDDEN,)
            yield TensorPlan(f"model.layers.{layer}.{part}.weight", shape)
        layer += 1


def moe(size_bytes: int, tensor_count: int = 10_240) -> Iterator[TensorPlan]:
    """A mixture of experts: at least ``tensor_count`` tensors, nearly all small, of equal size."""
    experts, parts = 128, ("gate_proj", "up_proj", "down_proj")
    columns = 256
    rows = max(1, size_bytes // (tensor_count * columns * 2))
    for number in range(tensor_count):
        layer, rest = divmod(number, experts * len(parts))
        expert, part = divmod(rest, len(parts))
        yield TensorPlan(f"model.layers.{layer}.mlp.experts.{expert}.{parts[part]}.weight", (rows, columns))


def fp8(size_bytes: int) -> Iterator[TensorPlan]:
    """Dense, in F8_E4M3 with a small F32 scale for each matrix, as DeepSeek's are."""
    for plan in dense(size_bytes):
        if len(plan.shape) == 1:
            yield plan
            continue
        yield TensorPlan(plan.name, plan.shape, "F8_E4M3")
        yield TensorPlan(f"{plan.name}_scale_inv", tuple(-(-side // 128) for side in plan.shape), "F32")


Kind = Callable[[int], Iterator[TensorPlan]]


def write_checkpoint(
    folder: Path, *, size_bytes: int, shard_bytes: int = 512 << 20, kind: Kind = dense, seed: int = 0
) -> Path:
    """About ``size_bytes`` of weights in shards of about ``shard_bytes``, named and indexed as engines expect them."""
    folder.mkdir(parents=True, exist_ok=True)
    count = max(1, round(size_bytes / shard_bytes))
    random = np.random.Generator(np.random.SFC64(seed))
    weight_map: dict[str, str] = {}
    total_bytes = 0
    for number, plans in enumerate(_shards(kind(size_bytes), size_bytes, count), 1):
        path = folder / f"model-{number:05d}-of-{count:05d}.safetensors"
        total_bytes += _write_shard(path, plans, random)
        weight_map |= dict.fromkeys((plan.name for plan in plans), path.name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HIDDEN}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in _SMALL_FILES.items():
        (folder / name).write_text(text)
    return folder


class Checkpoints:
    """Makes each checkpoint once, below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Path] = {}

    def get(self, name: str, *, size_bytes: int, shard_bytes: int = 512 << 20, kind: Kind = dense) -> Path:
        """The folder of the checkpoint ``name``, with the page cache written out."""
        if name not in self._made:
            self._made[name] = write_checkpoint(
                self._folder / name, size_bytes=size_bytes, shard_bytes=shard_bytes, kind=kind, seed=len(self._made)
            )
        return self._made[name]


def total_bytes(folder: Path, pattern: str = "*") -> int:
    """Of the files in a folder."""
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())


def _shards(plans: Iterator[TensorPlan], size_bytes: int, count: int) -> Iterator[list[TensorPlan]]:
    """``count`` shards of equal size and ``size_bytes`` together; a tensor that would not fit loses rows."""
    for _number in range(count):
        left_bytes, shard = size_bytes // count, list[TensorPlan]()
        for plan in plans:
            fitting = _cut(plan, left_bytes)
            if fitting:
                shard.append(fitting)
                left_bytes -= fitting.size_bytes
            if fitting != plan or not left_bytes:
                break
        yield shard


def _cut(plan: TensorPlan, left_bytes: int) -> TensorPlan | None:
    if plan.size_bytes <= left_bytes:
        return plan
    rows = left_bytes * plan.shape[0] // plan.size_bytes
    return TensorPlan(plan.name, (rows, *plan.shape[1:]), plan.dtype) if rows else None


def _write_shard(path: Path, plans: Sequence[TensorPlan], random: np.random.Generator) -> int:
    """Returns the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for plan in plans:
        begin, end = end, end + plan.size_bytes
        header[plan.name] = {"dtype": plan.dtype, "shape": plan.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, end, _BLOCK_BYTES):
            words = random.integers(0, 1 << 64, _BLOCK_BYTES // 8, dtype=np.uint64)
            file.write(memoryview(words).cast("B")[: min(_BLOCK_BYTES, end - start)])
        file.flush()
    return end
