"""Tensors are found in the heads of files, of which no more is read than they are long."""

from __future__ import annotations

import json
import struct

import pytest

from cached.cache.chooser import chunks_of
from cached.errors import BadFormatError, LevelError
from cached.transfer.heads import HEAD_BYTES, find_tensors
from cached.transfer.jobs import FindTensors, Found
from cached.units import CHUNK_BYTES

SIZES = {"a.weight": 10, "a.norm": 0, "b.weight": 6}


class Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.read_bytes: list[tuple[int, int]] = []

    def __call__(self, offset_bytes: int, length_bytes: int) -> bytes:
        self.read_bytes.append((offset_bytes, length_bytes))
        return self.data[offset_bytes : offset_bytes + length_bytes]


def weights(pad_bytes: int = 0) -> bytes:
    table, at = {}, 0
    for name, size_bytes in SIZES.items():
        table[name] = {"dtype": "U8", "shape": [size_bytes], "data_offsets": [at, at + size_bytes]}
        at += size_bytes
    header = json.dumps(table).encode()
    header = header.ljust(len(header) + pad_bytes)
    return struct.pack("<Q", len(header)) + header + bytes(at)


def found(job: FindTensors, reader: Reader) -> Found:
    return find_tensors(job, "w.safetensors", len(reader.data), reader)


def test_a_head_says_where_tensors_are() -> None:
    reader = Reader(weights())
    answer = found(FindTensors(("a.*", "c.*", "b.wait")), reader)
    head_bytes = len(reader.data) - 16
    assert answer.names == ("a.weight", "a.norm")
    assert (answer.begins, answer.ends) == ((head_bytes, head_bytes + 10), (head_bytes + 10, head_bytes + 10))
    assert (answer.dtypes, answer.shapes) == (("U8", "U8"), ((10,), (0,)))
    assert (answer.unmatched, answer.head_bytes) == ((1, 2), head_bytes)
    assert answer.near == ((), ("b.weight",))
    assert reader.read_bytes == [(0, len(reader.data))]


def test_of_a_long_head_the_rest_is_read_and_no_byte_more() -> None:
    reader = Reader(weights(pad_bytes=3 * HEAD_BYTES))
    assert found(FindTensors(("b.*",)), reader).names == ("b.weight",)
    head_bytes = len(reader.data) - 16
    assert reader.read_bytes == [(0, HEAD_BYTES), (HEAD_BYTES, head_bytes - HEAD_BYTES)]


def test_no_more_is_read_than_may_be() -> None:
    with pytest.raises(LevelError):
        found(FindTensors(("*",), limit_bytes=HEAD_BYTES), Reader(weights(pad_bytes=HEAD_BYTES)))
    assert found(FindTensors(("*",), limit_bytes=HEAD_BYTES), Reader(weights())).names == tuple(SIZES)


def test_an_index_says_which_file_has_a_tensor() -> None:
    reader = Reader(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}).encode())
    answer = found(FindTensors(("b", "c"), listing=True), reader)
    assert (answer.names, answer.paths) == (("b",), ("2.safetensors",))
    assert (answer.weights, answer.unmatched) == (("1.safetensors", "2.safetensors"), (1,))


@pytest.mark.parametrize("listing", [True, False])
def test_what_is_no_head_or_index_is_told(listing: bool) -> None:
    with pytest.raises(BadFormatError):
        found(FindTensors(("*",), listing=listing), Reader(b"\xff" * 100))


@pytest.mark.parametrize(
    ("begin", "end", "chunks"),
    [
        (0, 0, []),
        (0, 1, [0]),
        (5, CHUNK_BYTES, [0]),
        (5, CHUNK_BYTES + 1, [0, 1]),
        (CHUNK_BYTES - 1, 3 * CHUNK_BYTES, [0, 1, 2]),
        (CHUNK_BYTES, CHUNK_BYTES, []),
    ],
)
def test_a_range_is_held_by_the_chunks_that_it_touches(begin: int, end: int, chunks: list[int]) -> None:
    assert list(chunks_of(begin, end)) == chunks
