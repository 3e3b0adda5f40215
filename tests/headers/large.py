"""``python -m tests.headers.large KIND MEGABYTES``: reads one large header, and says what that took, as JSON.

A process of its own, because the kernel counts a peak for each process. The header itself is not counted.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

from cached_client.errors import FormatError
from cached_client.safetensors_header import LENGTH_BYTES, MAX_TENSORS, parse_header

_TENSOR = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'


def _many(one: Callable[[int], bytes], size: int, most: int | None = None) -> bytes:
    parts: list[bytes] = []
    left = size
    for number in count():
        part = one(number)
        left -= len(part) + 1
        if left < 100 or (most is not None and number >= most):
            return b"{" + b",".join(parts) + b"}"
        parts.append(part)
    raise AssertionError


def _tensor(number: int) -> bytes:
    return b'"%x":%b' % (number, _TENSOR)


KINDS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "tensors": ("more than 500000 tensors", lambda size: _many(_tensor, size)),
    "tensors in the grammar": (
        "more than 500000 tensors",
        lambda size: _many(_tensor, size).replace(b":{", b":\t{", 1),
    ),
    "tensors spelt otherwise": (
        "more than 500000 tensors",
        lambda size: _many(_tensor, size * 9 // 10).replace(b"data_offsets", b"data_offset\\u0073"),
    ),
    "as many tensors as may be": ("", lambda size: _many(_tensor, size, MAX_TENSORS)),
    "metadata": (
        "more than 10000 entries",
        lambda size: b'{"__metadata__":' + _many(lambda number: b'"%x":""' % number, size - 20) + b"}",
    ),
    "a value of the metadata": ("", lambda size: b'{"__metadata__":{"a":"%b\xf0\x9f\x98\x80"}}' % (b"v" * (size - 50))),
    "a name": ("1024 are the most", lambda size: b'{"%b":%b}' % (b"n" * (size - 100), _TENSOR)),
    "a wide name": ("1024 are the most", lambda size: b'{"%b\xf0\x9f\x98\x80":%b}' % (b"n" * (size - 100), _TENSOR)),
    "a key": ("unknown key", lambda size: b'{"a":{"%b":1}}' % (b"k" * (size - 100))),
    "a dtype": ("unknown dtype", lambda size: _TENSOR.replace(b"U8", b"U" * (size - 100)).join((b'{"a":', b"}"))),
    "dimensions": ("at most 64", lambda size: b'{"a":{"dtype":"U8","shape":[%b1]}}' % (b"1," * (size // 2 - 50))),
    "digits": ("at most 64", lambda size: b'{"a":{"dtype":"U8","shape":[%b]}}' % (b"9" * (size - 100))),
    "blanks": ("at most 64", lambda size: b'{"a":{"dtype":"U8","shape":[1%bx]}}' % (b" " * (size - 100))),
    "nesting": ("unknown key", lambda size: b'{"a":' * (size // 5)),
    "arrays": ("'{' is expected", lambda size: b'{"a":' + b"[" * (size - 10)),
    "quotes": ("':' is expected", lambda size: b"{" + b'"' * (size - 1)),
    "backslashes": ("broken", lambda size: b'{"' + b"\\" * (size - 2)),
}
"""What the error says (nothing: it is accepted), and how a header of so many bytes is made."""


def _resident_kib(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def main(kind: str, megabytes: str) -> None:
    text = KINDS[kind][1](int(megabytes) * 1_000_000)
    content = len(text).to_bytes(LENGTH_BYTES, "little") + text
    header_bytes = len(content)
    del text
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before_kib = _resident_kib("VmRSS")
    message, fields = "", 0
    try:
        parse_header(content, header_bytes, path="large.safetensors")
    except FormatError as error:
        message, fields = error.message, sum(map(len, error.fields.values()))
    grown = (_resident_kib("VmHWM") - before_kib) * 1024
    print(json.dumps({"message": message, "fields": fields, "header_bytes": header_bytes, "grown_bytes": grown}))


if __name__ == "__main__":
    main(*sys.argv[1:])
