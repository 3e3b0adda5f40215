"""Makes headers: real ones that were damaged, and others that were built wrong on purpose. Each from a number alone."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.numpy

from cached_client.dtypes import DTYPES
from cached_client.safetensors_header import LENGTH_BYTES
from tests.headers import corpus

_NUMBERS = [
    0, 1, 2, 3, 4, 7, 8, 16, 64, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**61, 2**63 - 1, 2**63, 2**64 - 1, 2**64,
    10**25,
]  # fmt: skip
_TOKENS = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"\\u0061", b"null", b"true", b"-", b"0",
    b"1e3", b".5", b"NaN", b" ", b"\t", b"\n", b"\0", b"\xff", b"\xc2\x80", b"\xf0\x9f\x98\x80", b'"__metadata__"',
    b'"dtype"', b'"shape"', b'"data_offsets"', b'"U8"', b'"BF16"', b'"F4"', b"[0,0]", b'"x":{}', b"[" * 200,
    b'{"a":' * 200,
]  # fmt: skip
_NAMES = [
    "a", "b", "weight", "model.layers.0.mlp.gate_proj.weight", "é", "😀", "\u202e", "", "__metadata__", "a\0b",
    "\x1b[31m", "\x7f", "\x85", "a\nb", "../../etc/passwd", "/", "n" * 1024, "n" * 1025, "n" * 4096, 'q"\\', "\u2028",
]  # fmt: skip


def header_file(seed: int) -> bytes:
    """A whole small file. The same seed makes the same one."""
    rng = random.Random(seed)
    if rng.random() < 0.45:
        return _damaged(rng)
    return _built(rng)


def _with_length(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(LENGTH_BYTES, "little") + text + data


# Real ones, damaged.


def _real() -> list[bytes]:
    """Files as libraries write them, and the corpus."""
    layers = {
        f"model.layers.{layer}.{part}.weight": np.full((2, layer + 1), layer, np.float16)
        for layer in range(3)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)
    mixed = {f"t.{kind.__name__}": np.zeros((3, 1), kind) for kind in kinds}
    written = [
        safetensors.numpy.save(layers, {"format": "pt"}),
        safetensors.numpy.save(mixed),
        safetensors.numpy.save({"scalar": np.zeros((), np.float32), "empty": np.zeros((0, 5), np.int8)}, {"a": "b"}),
    ]
    return written * 8 + [item.content for item in corpus() if len(item.content) < 4096]


_SEEDS = _real()


def _damaged(rng: random.Random) -> bytes:
    content = rng.choice(_SEEDS)
    length = int.from_bytes(content[:LENGTH_BYTES], "little")
    if length > len(content) - LENGTH_BYTES or len(content) < LENGTH_BYTES:
        length = max(0, len(content) - LENGTH_BYTES)
    text, data = bytearray(content[LENGTH_BYTES : LENGTH_BYTES + length]), content[LENGTH_BYTES + length :]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        rng.choice(_DAMAGES)(rng, text)
    if rng.random() < 0.05:
        data = data[: rng.randrange(len(data) + 1)] if rng.random() < 0.5 else data + bytes(rng.randrange(1, 9))
    made = _with_length(bytes(text), data)
    if rng.random() < 0.05:
        claimed = rng.choice([*_NUMBERS[:-2], len(text) - 1, len(text) + 1, 100_000_000, 100_000_001])
        made = max(0, claimed).to_bytes(LENGTH_BYTES, "little") + made[LENGTH_BYTES:]
    return made[: rng.randrange(len(made) + 1)] if rng.random() < 0.03 else made


def _span(rng: random.Random, text: bytearray) -> slice:
    begin = rng.randrange(len(text) + 1)
    return slice(begin, begin + rng.choice([1, 1, 2, 5, 20, 80]))


def _flip(rng: random.Random, text: bytearray) -> None:
    if text:
        text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)


def _insert(rng: random.Random, text: bytearray) -> None:
    at = rng.randrange(len(text) + 1)
    text[at:at] = rng.choice(_TOKENS)


def _delete(rng: random.Random, text: bytearray) -> None:
    del text[_span(rng, text)]


def _double(rng: random.Random, text: bytearray) -> None:
    span = _span(rng, text)
    at = rng.choice([span.start, span.stop])
    text[at:at] = text[span]


def _number(rng: random.Random, text: bytearray) -> None:
    found = list(re.finditer(rb"\d+", text))
    if found:
        match = rng.choice(found)
        near = [int(match[0]) - 1, int(match[0]) + 1] if len(match[0]) < 30 else [0]
        text[match.start() : match.end()] = str(rng.choice(_NUMBERS + near)).encode()


def _word(rng: random.Random, text: bytearray) -> None:
    """A string becomes another one of the header: names, keys and types come twice, and where they should not."""
    found = list(re.finditer(rb'"[^"]*"', text))
    if found:
        match, other = rng.choice(found), rng.choice(found)
        text[match.start() : match.end()] = other[0]


def _member(rng: random.Random, text: bytearray) -> None:
    """A whole member once more, or away."""
    found = list(re.finditer(rb'"[^"]*":\s*\{[^{}]*\},?', text))
    if found:
        match = rng.choice(found)
        again = match[0].rstrip(b",") + b"," if rng.random() < 0.7 else b""
        text[match.start() : match.end()] = again + match[0] if again else b""


_DAMAGES: list[Callable[[random.Random, bytearray], None]] = [
    _flip, _insert, _delete, _double, _number, _number, _word, _word, _member
]  # fmt: skip


# Others, built wrong.


def _built(rng: random.Random) -> bytes:
    members, at = [], 0
    for number in range(rng.choice([0, 1, 2, 2, 3, 4, 6])):
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice([0, 1, 1, 2, 3, 4]) for _ in range(rng.choice([0, 1, 2, 2, 3]))]
        bits = DTYPES[dtype].bits * int(np.prod(shape, dtype=object))
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        members.append([f"t{number}", {"dtype": dtype, "shape": shape, "data_offsets": [at, at + bits // 8]}])
        at += bits // 8
    if rng.random() < 0.4:
        rng.shuffle(members)
    if rng.random() < 0.5:
        metadata = {rng.choice(["format", "a", "b\n", "é"]): rng.choice(["pt", "", "\0", "x" * 300])}
        members.insert(rng.randrange(len(members) + 1), ["__metadata__", metadata])
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        if members:
            rng.choice(_WRONGS)(rng, members)
    text = _written(rng, members)
    if rng.random() < 0.1:
        text = rng.choice([b" ", b"\n", b"\xef\xbb\xbf", b"\t\t"]) + text
    text += rng.choice([b"", b" " * (-len(text) % 8), b" \n", b"\0"]) if rng.random() < 0.5 else b""
    return _with_length(text, rng.randbytes(at if rng.random() < 0.93 else max(0, at + rng.choice([-1, 1, 4]))))


def _rename(rng: random.Random, members: list[Any]) -> None:
    rng.choice(members)[0] = rng.choice(_NAMES)


def _repeat(rng: random.Random, members: list[Any]) -> None:
    members.insert(rng.randrange(len(members) + 1), list(rng.choice(members)))


def _same_name(rng: random.Random, members: list[Any]) -> None:
    rng.choice(members)[0] = rng.choice(members)[0]


def _shift(rng: random.Random, members: list[Any]) -> None:
    entry = rng.choice(members)[1]
    if isinstance(entry, dict) and "data_offsets" in entry:
        offsets = list(entry["data_offsets"])
        if offsets:
            offsets[rng.randrange(len(offsets))] = rng.choice([*_NUMBERS, -1, offsets[0] + 1, offsets[-1] - 1])
        entry["data_offsets"] = rng.choice([offsets, offsets, offsets[::-1], offsets + offsets, offsets[:1]])


def _reshape(rng: random.Random, members: list[Any]) -> None:
    entry = rng.choice(members)[1]
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if isinstance(shape, list) and all(isinstance(extent, int) for extent in shape):
        entry["shape"] = rng.choice(
            [
                [*shape, 1],
                shape[:-1],
                [1] * rng.choice([60, 64, 65, 100]) + shape,
                [rng.choice(_NUMBERS), *shape],
                [*shape, rng.choice(_NUMBERS), 0],
                [0, rng.choice(_NUMBERS), rng.choice(_NUMBERS)],
                [float(extent) for extent in shape],
                [-extent for extent in shape],
                [shape],
            ]
        )


def _other_form(rng: random.Random, members: list[Any]) -> None:
    member = rng.choice(members)
    entry = member[1]
    if not isinstance(entry, dict) or "dtype" not in entry:
        member[1] = rng.choice([None, [], {}, "text", 1, {"a": None}, {"a": {"b": "c"}}])
        return
    array = [entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")]
    member[1] = rng.choice(
        [array, {**entry, "dtype": {str(entry["dtype"]): None}}, None, [], array[:2], json.dumps(entry)]
    )


def _retype(rng: random.Random, members: list[Any]) -> None:
    entry = rng.choice(members)[1]
    if isinstance(entry, dict) and "dtype" in entry:
        entry["dtype"] = rng.choice([*DTYPES, "Q4_K", "u8", "", "F32 ", None, 1])


def _key(rng: random.Random, members: list[Any]) -> None:
    entry = rng.choice(members)[1]
    if isinstance(entry, dict) and entry:
        if rng.random() < 0.5:
            deep: Any = 0
            for _ in range(rng.choice([0, 3, 100])):
                deep = [deep]
            entry[rng.choice(["strides", "x", "Dtype", "", "y" * 5000])] = deep
        else:
            entry.pop(rng.choice(list(entry)))


_WRONGS: list[Callable[[random.Random, list[Any]], None]] = [
    _rename, _rename, _repeat, _same_name, _shift, _shift, _reshape, _reshape, _other_form, _retype, _key
]  # fmt: skip


def _written(rng: random.Random, members: list[Any]) -> bytes:
    """As JSON, in one of the ways that there are; a name may come twice."""
    colon, comma = rng.choice([(":", ","), (": ", ", "), (" :\t", " ,\n")])
    escape = rng.random() < 0.5

    def one(value: Any) -> str:
        if isinstance(value, dict):
            keys = list(value)
            rng.shuffle(keys)
            return "{" + comma.join(string(key) + colon + one(value[key]) for key in keys) + "}"
        return json.dumps(value, ensure_ascii=escape, separators=(comma, colon))

    def string(text: str) -> str:
        if rng.random() < 0.02:
            return '"' + "".join(f"\\u{unit:04x}" for unit in _units(text)) + '"'
        return json.dumps(text, ensure_ascii=escape)

    text = "{" + comma.join(string(name) + colon + one(value) for name, value in members) + "}"
    return text.encode("utf-8", "surrogatepass")


def _units(text: str) -> list[int]:
    data = text.encode("utf-16-be")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2)]
