"""Models whose tensors have names and places that tests of partial attaches know."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping

from cached.units import CHUNK_BYTES, chunk_count, chunk_length
from tests.integration.support import random_bytes

INDEX = "model.safetensors.index.json"


def tensor_file(sizes: Mapping[str, int], seed: int) -> bytes:
    """A safetensors file of U8 tensors of these sizes, in this order."""
    table, at = {}, 0
    for name, size_bytes in sizes.items():
        table[name] = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    header = json.dumps(table).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    return struct.pack("<Q", len(header)) + header + random_bytes(at, seed)


def layered(*chunks_of_layers: int, shards: int = 1, index: bool = True, seed: int = 1) -> dict[str, bytes]:
    """A model of so many layers, each with a weight of so many chunks and a small norm, over some shards."""
    files = {"config.json": json.dumps({"layers": len(chunks_of_layers), "seed": seed}).encode()}
    tensors: list[dict[str, int]] = [{} for _ in range(shards)]
    for layer, chunks in enumerate(chunks_of_layers):
        shard = tensors[layer * shards // len(chunks_of_layers)]
        shard[f"layers.{layer}.weight"] = chunks * CHUNK_BYTES
        shard[f"layers.{layer}.norm"] = 4096
    if shards == 1:
        return files | {"model.safetensors": tensor_file(tensors[0], seed)}
    paths = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    files |= {path: tensor_file(sizes, seed + at) for at, (path, sizes) in enumerate(zip(paths, tensors, strict=True))}
    if index:
        weight_map = {name: path for path, sizes in zip(paths, tensors, strict=True) for name in sizes}
        files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return files


def places(files: Mapping[str, bytes]) -> dict[str, tuple[str, int, int]]:
    """Tensor → file, and bytes [begin, end) in it, as read from the files themselves."""
    found = {}
    for path, data in files.items():
        if path.endswith(".safetensors"):
            (length,) = struct.unpack("<Q", data[:8])
            for name, item in json.loads(data[8 : 8 + length]).items():
                begin, end = item["data_offsets"]
                found[name] = (path, 8 + length + begin, 8 + length + end)
    return found


def content(files: Mapping[str, bytes], name: str) -> bytes:
    """The bytes of a tensor."""
    path, begin, end = places(files)[name]
    return files[path][begin:end]


def chunks(files: Mapping[str, bytes], names: Iterable[str]) -> set[tuple[str, int]]:
    """The chunks that hold these tensors."""
    where = [places(files)[name] for name in names]
    return {(path, at) for path, begin, end in where for at in range(begin // CHUNK_BYTES, chunk_count(end))}


def chunk_bytes(files: Mapping[str, bytes], wanted: Iterable[tuple[str, int]]) -> int:
    """What these chunks hold."""
    return sum(chunk_length(len(files[path]), at) for path, at in wanted)


def range_of(files: Mapping[str, bytes], path: str, at: int) -> str:
    """The Range header that asks for a chunk."""
    return f"bytes={at * CHUNK_BYTES}-{at * CHUNK_BYTES + chunk_length(len(files[path]), at) - 1}"
