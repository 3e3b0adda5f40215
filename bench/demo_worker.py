"""A worker of the demonstration: attaches a model, proves every tensor against the source, and computes with it.

Prints one JSON line when it is done and another, of the memory it maps, when it is sent a line; it holds its lease
until its standard input is closed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import cached_client

_SENTENCES = ["The weights are in memory already.", "A worker starts in milliseconds."]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--embed", action="store_true")
    arguments = parser.parse_args()
    with cached_client.connect(arguments.socket) as cache:
        started_s = time.perf_counter()
        with cache.attach(arguments.model) as model:
            tensors = model.state_dict()
            seconds = time.perf_counter() - started_s
            report = model.wait()
            result: dict[str, Any] = {
                "seconds": seconds,
                "from_level": report.from_level,
                "checked_by": report.checked_by,
                "size_bytes": sum(info.size_bytes for info in model.files.values()),
                "tensors": compare(tensors, arguments.source),
                "embedding_equal": embedding_equal(model, arguments.source) if arguments.embed else None,
            }
            say(result)
            sys.stdin.readline()  # until every worker has read all of it: only then is it shared by all
            say(shared_memory())
            sys.stdin.read()


def say(result: dict[str, Any]) -> None:
    """One line to whoever started this worker."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


def compare(tensors: dict[str, torch.Tensor], source: Path) -> int:
    """How many tensors were compared, byte for byte, with the plain files. Ends the worker at the first difference."""
    seen: set[str] = set()
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, framework="pt") as plain:
            for name in plain.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(as_bytes(tensors[name]), as_bytes(plain.get_tensor(name))):
                    sys.exit(f"tensor {name} of {path.name} differs from the source")
                seen.add(name)
    if seen != set(tensors):
        sys.exit(f"tensor names differ from the source: {sorted(seen ^ set(tensors))[:5]}")
    return len(seen)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def embedding_equal(model: cached_client.Model, source: Path) -> bool:
    """Whether sentence embeddings from the cache's tensors are those from the plain files, bit for bit."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model.directory)
    with torch.device("meta"):
        cached_module = AutoModel.from_config(AutoConfig.from_pretrained(model.directory))
    model.load_into(cached_module, strict=False)
    plain_module = AutoModel.from_pretrained(source)
    rebuild_buffers(cached_module, plain_module)
    inputs = tokenizer(_SENTENCES, padding=True, return_tensors="pt")
    mask = inputs["attention_mask"].unsqueeze(-1)
    embeddings = []
    for module in (cached_module, plain_module):
        with torch.inference_mode():
            hidden = module.eval()(**inputs).last_hidden_state
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        embeddings.append(torch.nn.functional.normalize(pooled))
    return torch.equal(*embeddings)


def rebuild_buffers(module: torch.nn.Module, like: torch.nn.Module) -> None:
    """Buffers that no checkpoint holds (position ids) are made by the constructor, which the meta device skipped."""
    for name, buffer in like.named_buffers():
        owner, _, leaf = name.rpartition(".")
        if module.get_buffer(name).is_meta:
            setattr(module.get_submodule(owner), leaf, buffer)


def shared_memory() -> dict[str, int]:
    """What this process maps of the cache's segments: resident bytes, its proportional share, and copies of its own."""
    sums = {"Rss": 0, "Pss": 0, "Anonymous": 0}
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        key, _, value = line.partition(":")
        if "-" in line.split(" ", 1)[0] and not value.strip().endswith("kB"):
            ours = "/dev/shm/cached." in line
        elif ours and key in sums:
            sums[key] += int(value.split()[0]) * 1024
    return {"mapped_rss_bytes": sums["Rss"], "mapped_pss_bytes": sums["Pss"], "copied_bytes": sums["Anonymous"]}


if __name__ == "__main__":
    main()
