"""Finds tensors in the head of a weight file, or in a model's index of them. Runs in movers, from any thread."""

from __future__ import annotations

from collections.abc import Callable

from cached.errors import BadFormatError, LevelError
from cached.transfer.jobs import FindTensors, Found
from cached_client.errors import FormatError
from cached_client.patterns import INDEX_PATH, matched, nearest, weight_files
from cached_client.safetensors_header import LENGTH_BYTES, header_length, parse_header
from cached_client.weight_map import parse_weight_map

__all__ = ["HEAD_BYTES", "INDEX_PATH", "find_tensors", "matched", "nearest", "weight_files"]

HEAD_BYTES = 65536
"""Read of a weight file at first: most headers fit. What is beyond is read by exactly its length."""

Read = Callable[[int, int], bytes]
"""Bytes of the file from an offset, of exactly this length."""


def find_tensors(job: FindTensors, path: str, size_bytes: int, read: Read) -> Found:
    """What of ``job.patterns`` is in the file. Raises BadFormatError, LevelError, and what ``read`` raises."""
    try:
        if job.listing:
            return _in_index(job, read(0, _within(job, size_bytes)))
        return _in_header(job, path, size_bytes, read)
    except FormatError as error:
        raise BadFormatError(error.message, hint=error.hint, **error.fields) from error


def _in_index(job: FindTensors, content: bytes) -> Found:
    weight_map = parse_weight_map(content)
    names, unmatched = matched(job.patterns, weight_map)
    return Found(
        names=tuple(names),
        paths=tuple(weight_map[name] for name in names),
        weights=tuple(sorted(set(weight_map.values()))),
        unmatched=tuple(unmatched),
        near=tuple(tuple(nearest(job.patterns[number], weight_map)) for number in unmatched),
    )


def _in_header(job: FindTensors, path: str, size_bytes: int, read: Read) -> Found:
    head = read(0, min(HEAD_BYTES, size_bytes, job.limit_bytes or size_bytes))
    head_bytes = LENGTH_BYTES + header_length(head, size_bytes, path=path)
    if head_bytes > len(head):
        head += read(len(head), _within(job, head_bytes) - len(head))
    tensors = parse_header(head, size_bytes, path=path).tensors
    names, unmatched = matched(job.patterns, tensors)
    found = [tensors[name] for name in names]
    return Found(
        names=tuple(names),
        dtypes=tuple(info.dtype for info in found),
        shapes=tuple(info.shape for info in found),
        begins=tuple(info.begin for info in found),
        ends=tuple(info.end for info in found),
        unmatched=tuple(unmatched),
        near=tuple(tuple(nearest(job.patterns[number], tensors)) for number in unmatched),
        head_bytes=head_bytes,
    )


def _within(job: FindTensors, length_bytes: int) -> int:
    """As much of the file may be read. Raises LevelError."""
    if job.limit_bytes and length_bytes > job.limit_bytes:
        path = job.source.path if job.source else ""
        raise LevelError(f"{path}: {length_bytes} bytes of it are needed, {job.limit_bytes} are proven", path=path)
    return length_bytes
