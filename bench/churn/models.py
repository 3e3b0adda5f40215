"""The models of the churn: a few hundred small checkpoints in families that share their base weights and tokenizer."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

FAMILY = 10
"""Models in a family: they share their tokenizer, and half of them their first shard too."""

_SMALLEST_BYTES, _LARGEST_BYTES = 200_000, 20_000_000
_LARGE_EVERY = 25
_LARGE_BYTES = 36_000_000
"""Of one shard in every so many models: three chunks, so that a selection of its tensors leaves some out."""

_TENSORS = 6


@dataclass(frozen=True, slots=True)
class ChurnModel:
    """A model as workers know it: the SHA-256 that each file must have, and each tensor of each shard."""

    name: str
    digests: dict[str, str]
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)


def make_models(folder: Path, count: int, seed: int) -> list[ChurnModel]:
    """Writes ``count`` models below ``folder``, each into a folder of its name; the same ones for the same seed."""
    rng = random.Random(seed)
    return [_make(folder / f"m{number:03}", number, rng) for number in range(count)]


def save(models: list[ChurnModel], file: Path) -> None:
    """For worker processes."""
    file.write_text(json.dumps([asdict(model) for model in models]), encoding="utf-8")


def load(file: Path) -> list[ChurnModel]:
    """What was saved."""
    return [ChurnModel(**item) for item in json.loads(file.read_text(encoding="utf-8"))]


def _make(folder: Path, number: int, rng: random.Random) -> ChurnModel:
    family, member = divmod(number, FAMILY)
    shared = random.Random(f"family {family}")
    contents = {
        "config.json": json.dumps({"model_type": "churn", "number": number}).encode(),
        "tokenizer.json": _json_of(shared.randint(50_000, 400_000), shared),
    }
    sizes = [_size(rng) for _ in range(rng.randint(1, 3))]
    if number % _LARGE_EVERY == 0:
        sizes[-1] = _LARGE_BYTES
    tensors: dict[str, dict[str, str]] = {}
    for shard, size_bytes in enumerate(sizes):
        path = f"model-{shard + 1:05}-of-{len(sizes):05}.safetensors" if len(sizes) > 1 else "model.safetensors"
        names = [f"layers.{shard}.{part}.weight" for part in range(_TENSORS)]
        if shard == 0 and member % 2:
            base = random.Random(f"base {family}")
            contents[path], tensors[path] = _safetensors(names, _size(base), base)
        else:
            contents[path], tensors[path] = _safetensors(names, size_bytes, rng)
    folder.mkdir(parents=True)
    for path, data in contents.items():
        (folder / path).write_bytes(data)
    return ChurnModel(folder.name, {path: _sha256(data) for path, data in contents.items()}, tensors)


def _size(rng: random.Random) -> int:
    """Most are a megabyte or two, some ten times that."""
    return max(_SMALLEST_BYTES, min(_LARGEST_BYTES, int(rng.lognormvariate(0.4, 0.9) * 1e6)))


def _json_of(size_bytes: int, rng: random.Random) -> bytes:
    return json.dumps({"vocabulary": rng.randbytes(size_bytes // 2).hex()}).encode()


def _safetensors(names: list[str], size_bytes: int, rng: random.Random) -> tuple[bytes, dict[str, str]]:
    """The file, and the SHA-256 of each tensor."""
    step = size_bytes // len(names)
    header = {
        name: {"dtype": "U8", "shape": [step], "data_offsets": [at * step, (at + 1) * step]}
        for at, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    tensors = {name: rng.randbytes(step) for name in names}
    data = len(text).to_bytes(8, "little") + text + b"".join(tensors.values())
    return data, {name: _sha256(tensor) for name, tensor in tensors.items()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
