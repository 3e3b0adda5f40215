"""The strict header parser: what safetensors accepts it reads alike; everything else is a FormatError."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cached_client import safetensors_header
from cached_client.dtypes import DTYPES
from cached_client.errors import FormatError
from cached_client.safetensors_header import (
    LENGTH_BYTES,
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    header_length,
    parse_header,
)
from tests.headers import Verdict, corpus
from tests.headers.judge import judge


def build(header: Any, data_bytes: int = 0, *, length: int | None = None) -> bytes:
    """A file with this header (an object, or the raw text) and so many bytes of data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(LENGTH_BYTES, "little") + text + bytes(data_bytes)


def parse(content: bytes) -> Header:
    return parse_header(content, len(content), path="model.safetensors")


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_offsets_shapes_and_metadata_in_the_order_of_the_bytes() -> None:
    header = {
        "__metadata__": {"format": "pt", "quote": 'a "b" é \\ {['},
        "second": entry("F32", [1, 2], 6, 14),
        "first": entry("BF16", [3], 0, 6),
        "empty": entry("I64", [0, 7], 14, 14),
    }
    content = build(header, 14)
    found = parse(content)

    start = len(content) - 14
    assert found.header_bytes == start
    assert found.metadata == header["__metadata__"]
    assert list(found.tensors.values()) == [
        TensorInfo("first", "BF16", (3,), start, start + 6),
        TensorInfo("second", "F32", (1, 2), start + 6, start + 14),
        TensorInfo("empty", "I64", (0, 7), start + 14, start + 14),
    ]
    assert found.data_offsets("second") == (6, 14)
    assert found.tensors["second"].size_bytes == 8


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_agrees_with_safetensors_on_every_dtype(dtype: str) -> None:
    bits = DTYPES[dtype].bits
    content = build({"t": entry(dtype, [2, 4], 0, bits)}, bits)
    [(name, view)] = safetensors.deserialize(content)
    info = parse(content).tensors["t"]
    assert (name, view["dtype"], view["shape"]) == (info.name, info.dtype, list(info.shape))
    assert len(view["data"]) == info.size_bytes == bits


def test_a_header_may_be_padded_with_spaces_and_hold_no_tensor() -> None:
    assert parse(build(b"{}      ")) == Header({}, {}, 16)


def test_scalars_have_an_empty_shape() -> None:
    assert parse(build({"s": entry("F64", [], 0, 8)}, 8)).tensors["s"].shape == ()


GOOD = entry("U8", [4], 0, 4)


@pytest.mark.parametrize("verdict", corpus(), ids=lambda verdict: verdict.name)
def test_the_corpus_has_its_verdicts(verdict: Verdict) -> None:
    assert refused_by_safetensors(verdict.content) == (verdict.reference == "refused")
    if verdict.verdict == "accepted":
        assert judge(verdict.content) == "accepted"
        return
    with pytest.raises(FormatError, match=verdict.says) as caught:
        parse(verdict.content)
    assert caught.value.fields["path"] == "model.safetensors"
    assert caught.value.hint


def test_an_error_names_the_tensor_and_the_key() -> None:
    with pytest.raises(FormatError) as caught:
        parse(build({"layer.0": {**GOOD, "dtype": "Q4_K"}}, 4))
    assert caught.value.fields["tensor"] == "layer.0"
    assert caught.value.fields["key"] == "dtype"


def test_refuses_a_length_before_it_reads_on() -> None:
    for length in (MAX_HEADER_BYTES + 1, 2**63, 2**64 - 1):
        with pytest.raises(FormatError, match="is the most"):
            header_length(length.to_bytes(LENGTH_BYTES, "little"), 2**64)


def test_needs_the_whole_header() -> None:
    content = build({"a": GOOD}, 4)
    assert header_length(content, len(content)) == len(content) - LENGTH_BYTES - 4
    assert parse_header(content[:-4], len(content)).tensors
    with pytest.raises(FormatError, match="were given"):
        parse_header(content[:-5], len(content))


def test_an_error_quotes_little_of_what_it_refuses() -> None:
    for header in ({"n" * 9999: GOOD}, {"a": {"k" * 9999: 1}}, {"a": {**GOOD, "dtype": "U" * 9999}}):
        with pytest.raises(FormatError) as caught:
            parse(build(header, 4))
        assert len(caught.value.message) < 400
        assert all(len(value) <= 200 for value in caught.value.fields.values())


@pytest.mark.parametrize("plain", [True, False])
def test_there_may_be_so_many_tensors_and_no_more(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "MAX_TENSORS", 3)
    key = "data_offsets" if plain else "data_offset\\u0073"
    entries = [f'"{name}":{{"dtype":"U8","shape":[0],"{key}":[0,0]}}' for name in "abcd"]
    assert len(parse(build(f"{{{','.join(entries[:3])}}}".encode())).tensors) == 3
    with pytest.raises(FormatError, match="more than 3 tensors"):
        parse(build(f"{{{','.join(entries)}}}".encode()))


def test_metadata_has_so_many_entries_and_no_more() -> None:
    entries = {str(number): "" for number in range(safetensors_header.MAX_METADATA_ENTRIES)}
    assert parse(build({"__metadata__": entries})).metadata == entries
    with pytest.raises(FormatError, match="more than 10000 entries"):
        parse(build({"__metadata__": {**entries, "one more": ""}}))


def test_imports_only_the_standard_library() -> None:
    code = (
        "import sys, cached_client.safetensors_header\n"
        "heavy = {'grpc', 'google', 'numpy', 'torch'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def read_in_one_pass(content: bytes) -> bool:
    """Whether the quick pass reads this header, and not the grammar."""
    text = content[LENGTH_BYTES : LENGTH_BYTES + header_length(content, len(content))].decode()
    return safetensors_header._read_plain(text, text.index("},") + 2, 0) is not None


def test_what_libraries_write_is_read_in_one_pass() -> None:
    tensors = {f"model.layers.{layer}.é.weight": np.zeros((2, 3), np.float16) for layer in range(100)}
    content = safetensors.numpy.save(tensors, {"format": "pt"})
    assert read_in_one_pass(content)
    assert len(parse(content).tensors) == 100
    header = {"__metadata__": {"format": "pt"}, "b": entry("U8", [3], 1, 4), "a": entry("U8", [], 0, 1)}
    content = build(header, 4)
    assert read_in_one_pass(content)
    assert list(parse(content).tensors) == ["a", "b"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
SHAPED = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__", "c"]),
    st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from([*DTYPES, "nope"]) | JSON,
            "shape": st.lists(st.integers(-1, 4) | JSON, max_size=4) | JSON,
            "data_offsets": st.lists(st.integers(-1, 40), max_size=3) | JSON,
            "extra": JSON,
        },
    )
    | JSON,
    max_size=4,
)


def outcome(content: bytes) -> object:
    """What the parser says, with offsets that do not depend on the header's length."""
    try:
        found = parse(content)
    except FormatError:
        return FormatError
    return found.metadata, [(info[:3], found.data_offsets(name)) for name, info in found.tensors.items()]


@st.composite
def plain_headers(draw: st.DrawFn) -> tuple[str, str, int]:
    """A list of entries as libraries write them, right or almost so; what precedes it; and bytes of data."""
    entries, at = [], 0
    for _ in range(draw(st.integers(1, 4))):
        name = draw(st.sampled_from(["a", "b", "c", "d", "e", "f", "é", "__metadata__"]))
        kinds = {"U8 3": 3, "U8 ": 1, "BF16 2, 1": 4, "F4 1,2": 1, "F4 3": 2, "U8 01": 1, "U8 1,": 1, "Q4 1": 1}
        kind = draw(st.sampled_from(["U8 3", "BF16 2, 1", *kinds]))
        dtype, _, shape = kind.partition(" ")
        begin = at + draw(st.sampled_from([0] * 12 + [1, 10**30]))
        end = begin + kinds[kind] + draw(st.sampled_from([0] * 12 + [1, -2]))
        offsets = f"[{begin}, {end}]"
        entries.append(f'"{name}": {{"dtype": "{dtype}", "shape": [{shape}], "data_offsets": {offsets}}}')
        at = end
    ends = draw(st.sampled_from(["}", "}  ", "}", "},", "}}", ",}", "} x", ""]))
    listed = draw(st.permutations(entries)) if draw(st.booleans()) else entries
    return draw(st.sampled_from(["{", '{"__metadata__": {"k": "v"},'])), ", ".join(listed) + ends, max(0, min(at, 99))


@settings(max_examples=3000, deadline=None)
@given(header=plain_headers())
@example(header=("{", '"a": {"dtype": "Q4", "shape": [], "data_offsets": [1, 0]}}', 0))
def test_the_quick_pass_and_the_grammar_agree(header: tuple[str, str, int]) -> None:
    before, entries, data_bytes = header
    quick = outcome(build(f"{before}{entries}".encode(), data_bytes))
    grammar = outcome(build(f"{before}\t{entries}".encode(), data_bytes))  # a tab is not plain
    assert quick == grammar


def refused_by_safetensors(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return True
    return False


@settings(max_examples=1500, deadline=None)
@given(header=SHAPED | JSON, data_bytes=st.integers(0, 40))
@example(header={"a": GOOD}, data_bytes=4)
def test_whatever_it_accepts_safetensors_accepts_too(header: Any, data_bytes: int) -> None:
    content = build(header, data_bytes)
    try:
        found = parse(content)
    except FormatError:
        return
    assert not refused_by_safetensors(content)
    assert sum(info.size_bytes for info in found.tensors.values()) == data_bytes


@settings(max_examples=1500, deadline=None)
@given(junk=st.binary(max_size=200), length=st.integers(0, 2**64 - 1) | st.none())
def test_junk_is_never_anything_but_a_format_error(junk: bytes, length: int | None) -> None:
    content = build(junk, length=length)
    try:
        parse(content)
    except FormatError:
        return
    assert not refused_by_safetensors(content)


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    """A correct file with up to six tensors of any dtype, listed in any order."""
    header: dict[str, Any] = {}
    at = 0
    for name in draw(
        st.lists(
            st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])).filter(
                lambda text: text != "__metadata__"
            ),
            max_size=6,
            unique=True,
        )
    ):
        dtype = draw(st.sampled_from(sorted(DTYPES)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=3)), 4]
        size_bytes = DTYPES[dtype].bits // 2
        for extent in shape[:-1]:
            size_bytes *= extent
        header[name] = entry(dtype, shape, at, at + size_bytes)
        at += size_bytes
    order = draw(st.permutations(list(header)))
    return build({"__metadata__": {"k": "v"}, **{name: header[name] for name in order}}, at)


@settings(max_examples=600, deadline=None)
@given(content=valid_files())
def test_reads_every_valid_file_as_safetensors_does(content: bytes) -> None:
    theirs = {
        name: (view["dtype"], view["shape"], bytes(view["data"])) for name, view in safetensors.deserialize(content)
    }
    ours = {
        info.name: (info.dtype, list(info.shape), content[info.begin : info.end])
        for info in parse(content).tensors.values()
    }
    assert ours == theirs


@settings(max_examples=1500, deadline=None)
@given(content=valid_files(), at=st.integers(0, 2**16), value=st.integers(0, 255))
def test_a_changed_byte_is_harmless_or_refused(content: bytes, at: int, value: int) -> None:
    damaged = bytearray(content)
    damaged[at % len(damaged)] = value
    try:
        parse(bytes(damaged))
    except FormatError:
        return
    assert not refused_by_safetensors(bytes(damaged))
