"""A random small Llama, an adapter of it, and what they must answer: transformers' greedy tokens, in float32.

torch and transformers are imported when they are used: collecting these tests must not cost every other run seconds.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

PROMPTS = ("the weights are in memory", "one download for all ranks", "a", "nobody reads them twice")
NEW_TOKENS = 16
_RANK, _ALPHA = 8, 64
_ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


@functools.cache
def llama(seed: int = 0) -> dict[str, bytes]:
    """Its files, about 85 MB in bfloat16, in several shards of several chunks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, initializer_range=0.05,
        dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="36MB")
        tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    made.train_from_iterator(PROMPTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@functools.cache
def adapter(seed: int = 1) -> dict[str, bytes]:
    """A LoRA adapter of `llama`, as PEFT saves one."""
    import torch
    from safetensors.torch import save

    weights = _weights(0)
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in weights.items():
        if name.split(".")[-2] in _ADAPTED:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(_RANK, weight.shape[1]) * 0.05
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], _RANK) * 0.05
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "small-llama", "r": _RANK, "lora_alpha": _ALPHA, "bias": "none",
        "target_modules": list(_ADAPTED), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": save(tensors)}


@functools.cache
def expected(seed: int = 0, *, adapted: bool = False) -> tuple[tuple[int, ...], ...]:
    """The greedy tokens for each of `PROMPTS`, computed from the files by transformers."""
    import torch
    from safetensors.torch import load
    from transformers import LlamaConfig, LlamaForCausalLM

    files = llama(seed)
    weights = {name: weight.float() for name, weight in _weights(seed).items()}
    if adapted:
        learned = load(adapter()["adapter_model.safetensors"])
        for name in [name for name in weights if name.split(".")[-2] in _ADAPTED]:
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            product = learned[f"{stem}.lora_B.weight"] @ learned[f"{stem}.lora_A.weight"]
            weights[name] = weights[name] + product * (_ALPHA / _RANK)
    config = json.loads(files["config.json"]) | {"dtype": "float32"}
    model = LlamaForCausalLM(LlamaConfig(**config)).float().eval()
    model.load_state_dict(weights)
    answers: list[tuple[int, ...]] = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids: list[int] = tokenizer()(prompt)["input_ids"]
            count = len(ids)
            for _ in range(NEW_TOKENS):
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
            answers.append(tuple(ids[count:]))
    return tuple(answers)


def _weights(seed: int) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    found: dict[str, Any] = {}
    for path, data in llama(seed).items():
        if path.endswith(".safetensors"):
            found |= load(data)
    return found
