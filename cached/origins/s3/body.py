"""The body of a GET, straight into the caller's memory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def range_problem(fields: Mapping[str, Any], offset_bytes: int, length_bytes: int, size_bytes: int) -> str:
    """What is wrong with the range of an answer, or empty.

    Judged by Content-Range and Content-Length, not by the status: rclone answers 200. An answer without Content-Range
    is the whole object, and right only if that was asked for.
    """
    answered = str(fields.get("ContentRange") or "")
    length = fields.get("ContentLength")
    if answered:
        match = _RANGE.fullmatch(answered.strip())
        if match is None or (int(match[1]), int(match[2])) != (offset_bytes, offset_bytes + length_bytes - 1):
            return f"its Content-Range is {answered[:80]!r}"
        if match[3] != "*" and int(match[3]) != size_bytes:
            return f"the object has {match[3]} bytes instead of {size_bytes}"
    elif length_bytes != size_bytes:
        return "it is the whole object instead of a range"
    if length is not None and int(length) != length_bytes:
        return f"it announces {length} bytes instead of {length_bytes}"
    return ""


def read_body(body: Any, view: memoryview) -> int:
    """Fills ``view`` from a botocore body and gives the count of bytes, less than asked for if the body ends early.

    Gives the connection back to its pool when the body was read to its end, else closes it. Raises what sockets raise.
    """
    raw = body._raw_stream  # noqa: SLF001 the public way copies every byte once more
    finished = False
    try:
        # urllib3's own readinto goes through its buffer; http.client's reads from the socket into the view.
        inner: Any = getattr(raw, "_fp", None)
        source: Any = inner if hasattr(inner, "readinto") else raw
        done_bytes = 0
        while done_bytes < len(view):
            count = source.readinto(view[done_bytes:])
            if not count:
                break
            done_bytes += count
        # A chunked body ends with a marker that has to be read too, before the connection can be used again.
        finished = done_bytes == len(view) and not source.read(1)
        return done_bytes
    finally:
        if not finished:
            raw.close()
        raw.release_conn()
