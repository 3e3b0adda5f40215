"""Makes checkpoints that look like real ones: several safetensors shards with an index, config and tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

_HIDDEN = 2048
_ROW_BYTES = _HIDDEN * 2
_BLOCK_BYTES = 1 << 20


def write_checkpoint(folder: Path, *, size_bytes: int, shard_bytes: int = 512 << 20, seed: int = 0) -> None:
    """About ``size_bytes`` of random BF16 weights in shards of ``shard_bytes``, named and indexed as engines expect."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    count = max(1, round(size_bytes / shard_bytes))
    weight_map: dict[str, str] = {}
    for number in range(count):
        path = folder / f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(path, size_bytes // count, number, random), path.name)
    index = {"metadata": {"total_size": size_bytes // count * count}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": _HIDDEN}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")


def _write_shard(path: Path, size_bytes: int, number: int, random: np.random.Generator) -> list[str]:
    """Seven matrices a layer, as in a Llama; the names of its tensors."""
    rows_left = size_bytes // _ROW_BYTES
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, names = 0, []
    while rows_left > 0:
        layer, part = divmod(len(names), 7)
        rows = min(rows_left, _HIDDEN * (4 if part > 3 else 1))
        name = f"model.layers.{number}.{layer}.{('q', 'k', 'v', 'o', 'gate', 'up', 'down')[part]}_proj.weight"
        end = offset + rows * _ROW_BYTES
        header[name] = {"dtype": "BF16", "shape": [rows, _HIDDEN], "data_offsets": [offset, end]}
        names.append(name)
        offset, rows_left = end, rows_left - rows
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, offset, _BLOCK_BYTES):
            file.write(random.bytes(min(_BLOCK_BYTES, offset - start)))
    return names
