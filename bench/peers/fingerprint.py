"""What tells apart a contestant that loaded the checkpoint from one that did not. Standard library only.

The sum over all tensors of the CRC-32 of name and bytes: the order does not matter, and no file format either. Unless
it is ``full``, only some blocks of each tensor are read: enough to find memory that was never filled.
"""

from __future__ import annotations

import json
import mmap
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

_BLOCK_BYTES = 4096


def fingerprint(tensors: Iterable[tuple[str, memoryview]], *, full: bool) -> int:
    """Of tensors by name, each a contiguous view of bytes."""
    total = 0
    for name, view in tensors:
        value = zlib.crc32(name.encode())
        for part in [view] if full else _blocks(view):
            value = zlib.crc32(part, value)
        total += value
    return total


def tensors_of(file: memoryview) -> Iterator[tuple[str, memoryview]]:
    """Of a whole safetensors file in memory."""
    length = int.from_bytes(file[:8], "little")
    data = file[8 + length :]
    for name, info in json.loads(bytes(file[8 : 8 + length])).items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            yield name, data[begin:end]


def fingerprint_of_files(paths: Iterable[Path], *, full: bool) -> int:
    """Of safetensors files on disk."""
    total = 0
    for path in paths:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
            view = memoryview(mapping)
            total += fingerprint(tensors_of(view), full=full)
            view.release()
    return total


def _blocks(view: memoryview) -> list[memoryview]:
    middle = len(view) // 2
    return [view[:_BLOCK_BYTES], view[middle : middle + _BLOCK_BYTES], view[-_BLOCK_BYTES:]]
