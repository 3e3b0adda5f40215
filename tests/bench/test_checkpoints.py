"""Generated checkpoints are what engines and peers expect."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from bench.checkpoints import Checkpoints, dense, fp8, moe, total_bytes, write_checkpoint
from bench.peers.fingerprint import fingerprint, fingerprint_of_files, tensors_of

MIB = 1 << 20


def tensors(folder: Path):
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("kind", [dense, fp8])
def test_shards_have_the_size_asked_for_and_the_index_names_every_tensor(tmp_path, kind):
    folder = write_checkpoint(tmp_path / "c", size_bytes=24 * MIB, shard_bytes=8 * MIB, kind=kind)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(folder))
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert total_bytes(folder, "*.safetensors") == pytest.approx(24 * MIB, rel=0.01)
    assert {path.name for path in folder.glob("*.json")} > {"config.json", "tokenizer_config.json"}


def test_a_mixture_of_experts_has_thousands_of_tensors(tmp_path):
    folder = write_checkpoint(tmp_path / "c", size_bytes=32 * MIB, shard_bytes=16 * MIB, kind=moe)
    assert len(tensors(folder)) >= 10_000
    assert total_bytes(folder, "*.safetensors") < 40 * MIB


def test_fp8_has_both_types(tmp_path):
    folder = write_checkpoint(tmp_path / "c", size_bytes=48 * MIB, kind=fp8)
    types = {item.get_dtype() for item in tensors(folder).values()}
    assert types >= {"F8_E4M3", "F32"}


def test_content_is_neither_compressible_nor_the_same_anywhere_but_the_same_again(tmp_path):
    first = write_checkpoint(tmp_path / "a", size_bytes=12 * MIB, shard_bytes=4 * MIB)
    data = [path.read_bytes() for path in sorted(first.glob("*.safetensors"))]
    assert all(len(zlib.compress(item, 1)) > 0.99 * len(item) for item in data)
    blocks = [item[start : start + 65536] for item in data for start in range(0, len(item), 65536)]
    assert len(set(blocks)) == len(blocks)
    again = write_checkpoint(tmp_path / "b", size_bytes=12 * MIB, shard_bytes=4 * MIB)
    assert [path.read_bytes() for path in sorted(again.glob("*.safetensors"))] == data


def test_each_is_made_once(tmp_path):
    made = Checkpoints(tmp_path)
    folder = made.get("x", size_bytes=MIB)
    before = (folder / "config.json").stat().st_mtime_ns
    assert made.get("x", size_bytes=MIB) == folder
    assert (folder / "config.json").stat().st_mtime_ns == before


def test_the_fingerprint_tells_missing_and_damaged_tensors(tmp_path):
    folder = write_checkpoint(tmp_path / "c", size_bytes=4 * MIB, shard_bytes=4 * MIB)
    paths = list(folder.glob("*.safetensors"))
    data = bytearray(paths[0].read_bytes())
    named = list(tensors_of(memoryview(data)))
    for full in (True, False):
        right = fingerprint_of_files(paths, full=full)
        assert fingerprint(reversed(named), full=full) == right
        assert fingerprint(named[1:], full=full) != right
    _, largest = max(named, key=lambda item: len(item[1]))
    largest[len(largest) // 3] ^= 1
    assert fingerprint(named, full=True) != fingerprint_of_files(paths, full=True)
    largest[:] = bytes(len(largest))
    assert fingerprint(named, full=False) != fingerprint_of_files(paths, full=False)
