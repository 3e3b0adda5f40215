"""Reads the header of a safetensors file, strictly. Standard library only; the daemon uses it too.

A file is: 8 bytes, the header's length as a little-endian integer; the header, a JSON object in UTF-8; then the
tensors' bytes, without gaps, to the end of the file. The format's own checks are those of
https://github.com/huggingface/safetensors (``safetensors/src/tensor.rs``); this parser refuses all that they refuse,
and also what docs/security.md lists: duplicate names, unknown keys, names that are odd, and more of anything than a
model has.

A header may come from anywhere, so it is read by its own small grammar and not by a general JSON parser: nesting is
three levels by construction, memory stays in proportion to the header and to what it may describe, and what an error
quotes is short.

Each worker reads the headers anew, and those of a large model list 10,000 tensors and more. The libraries write them
all alike, so such a list is first read in a few passes of C loops (`_read_plain`), which make every check that the
grammar makes but cannot say what is wrong: at anything out of the ordinary the grammar reads the same text instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from json import JSONDecodeError, JSONDecoder
from operator import itemgetter, ne, sub
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from cached_client.dtypes import DTYPES
from cached_client.errors import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

LENGTH_BYTES = 8
"""A file begins with the header's length in this many bytes."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""

MAX_TENSORS = 500_000
"""Of one file. The largest models have about 200,000 tensors, over dozens of files."""

MAX_METADATA_ENTRIES = 10_000
MAX_NAME_CHARACTERS = 1024
"""Of a tensor. No control characters either: names are printed, logged and compared."""

_MAX_DIMENSIONS = 64  # numpy's limit, the greatest of those who could use such a tensor
_MAX_BITS = 2**63 - 1
_MAX_SHOWN = 100
_METADATA = "__metadata__"
_TENSOR_KEYS = ("dtype", "shape", "data_offsets")

_SPACE = re.compile(r"[ \t\n\r]*")
_INTEGER = r"(?:0|[1-9][0-9]{0,19})"
_INTEGERS = re.compile(
    rf"\[\s*({_INTEGER}(?:\s*,\s*{_INTEGER}){{0,{_MAX_DIMENSIONS - 1}}})?\s*\]".replace(r"\s", r"[ \t\n\r]")
)
_DECODER = JSONDecoder()

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PLAIN_ENTRY = re.compile(
    rf' ?"([^"\\\x00-\x1f\x7f-\x9f]{{0,{MAX_NAME_CHARACTERS}}})": ?'
    r'\{"dtype": ?"([A-Z0-9_]+", ?"shape": ?\[[0-9, ]*)\], ?'
    rf'"data_offsets": ?\[({_INTEGER}), ?({_INTEGER})\]\}}(?:,|\}} *\Z)'
)
"""A tensor as libraries write it, and what ends it: a comma, or the header's closing brace and padding.

Its groups are the name, the dtype and shape with what stands between them (few kinds, however many tensors there are),
and the two offsets.

Every repetition in it ends where the next part begins, so a search takes time in proportion to the text.
"""


class TensorInfo(NamedTuple):
    """Where a tensor lies. ``begin`` and ``end`` are byte offsets from the start of the *file*.

    ``shape`` counts elements of ``dtype`` as the header does: a packed F4 tensor has twice as many as bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says.

    ``tensors`` are in the order of their bytes; ``header_bytes`` is where the first one begins.
    """

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    header_bytes: int

    def data_offsets(self, name: str) -> tuple[int, int]:
        """Begin and end of a tensor from the start of the *data*, as the header itself writes them."""
        info = self.tensors[name]
        return info.begin - self.header_bytes, info.end - self.header_bytes


def header_length(first8: bytes | bytearray | memoryview, file_size_bytes: int, *, path: str = "") -> int:
    """Length in bytes of the JSON that follows the first eight bytes, checked against the file's size.

    ``LENGTH_BYTES + header_length(...)`` bytes are what `parse_header` needs. Raises FormatError.
    """
    if file_size_bytes < LENGTH_BYTES or len(first8) < LENGTH_BYTES:
        _refuse(path, f"it has {file_size_bytes} bytes, fewer than the {LENGTH_BYTES} of the header's length")
    length = int.from_bytes(first8[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"its header would have {length} bytes; {MAX_HEADER_BYTES} is the most")
    if LENGTH_BYTES + length > file_size_bytes:
        _refuse(path, f"its header of {length} bytes does not fit into its {file_size_bytes} bytes")
    if length < len("{}"):
        _refuse(path, f"its header has {length} bytes, too few for a JSON object")
    return length


def parse_header(prefix: bytes | bytearray | memoryview, file_size_bytes: int, *, path: str = "") -> Header:
    """The header of a file of ``file_size_bytes``, of which ``prefix`` holds at least the length and the header.

    ``path`` is only for the messages. Raises FormatError; its fields name ``path``, ``tensor`` and ``key`` where they
    apply. Every offset in the answer lies within the file, and the tensors cover its data exactly.
    """
    length = header_length(prefix, file_size_bytes, path=path)
    header_bytes = LENGTH_BYTES + length
    if len(prefix) < header_bytes:
        _refuse(path, f"only {len(prefix)} of the header's {header_bytes} bytes were given")
    try:
        text = str(memoryview(prefix)[LENGTH_BYTES:header_bytes], "utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, f"its header is not UTF-8 at byte {LENGTH_BYTES + error.start}")
    header = _Parser(text, path).header(header_bytes)
    _check_cover(header, file_size_bytes, path)
    return header


def _refuse(path: str, what: str, **fields: str) -> NoReturn:
    raise FormatError(
        f"{path or 'the file'} is not a valid safetensors file: {what}",
        hint="the file is damaged, or was not written by a safetensors library; compare it with its origin",
        path=path,
        **fields,
    )


def _shown(text: str) -> str:
    """As an error quotes it: whatever it is, and however long, one short line."""
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}…"


_NEW_INFO: Callable[[Iterable[Any]], TensorInfo] = partial(tuple.__new__, TensorInfo)  # without a call in Python
_NAME, _BEGIN, _END = (itemgetter(TensorInfo._fields.index(field)) for field in ("name", "begin", "end"))
_PLACE = itemgetter(TensorInfo._fields.index("begin"), TensorInfo._fields.index("end"))


class _Parser:
    """A cursor over the header's text that knows the format's grammar and no other JSON."""

    def __init__(self, text: str, path: str) -> None:
        self._text = text
        self._path = path
        self._at = 0

    def header(self, header_bytes: int) -> Header:
        """The whole: ``{"__metadata__": {…}, NAME: {"dtype": …, "shape": […], "data_offsets": […]}, …}``."""
        if not self._text.startswith("{"):
            self._fail("it does not begin with '{'")
        self._check_count(self._text.count('"data_offsets"'))  # before anything is made of them
        tensors: list[TensorInfo] = []
        metadata: dict[str, str] = {}
        plain = _read_plain(self._text, 1, header_bytes)
        for name in self._members() if plain is None else ():
            if name != _METADATA:
                tensors.append(self._tensor(name, header_bytes))
                self._check_count(len(tensors))
                continue
            metadata = self._metadata()
            if not tensors and self._text.startswith(",", self._at):
                plain = _read_plain(self._text, self._at + 1, header_bytes)
                if plain is not None:
                    break
        if plain is None:
            self._skip_space()
            if self._at != len(self._text):
                self._fail("something follows the closing brace")
            tensors.sort(key=_PLACE)
        infos = plain or tensors
        return Header(dict(zip(map(_NAME, infos), infos, strict=True)), metadata, header_bytes)

    def _check_count(self, tensors: int) -> None:
        if tensors > MAX_TENSORS:
            self._fail(f"there are more than {MAX_TENSORS} tensors")

    def _metadata(self) -> dict[str, str]:
        metadata: dict[str, str] = {}
        for key in self._members():
            metadata[key] = self._string()
            if len(metadata) > MAX_METADATA_ENTRIES:
                self._fail(f"{_METADATA} has more than {MAX_METADATA_ENTRIES} entries", key=_METADATA)
        return metadata

    def _check_name(self, name: str) -> None:
        if len(name) > MAX_NAME_CHARACTERS:
            what = f"the name {_shown(name)} has {len(name)} characters; {MAX_NAME_CHARACTERS} are the most"
            self._fail(what, tensor=name)
        if _CONTROL.search(name):
            self._fail(f"the name {_shown(name)} has control characters", tensor=name)

    def _tensor(self, name: str, header_bytes: int) -> TensorInfo:
        self._check_name(name)
        dtype = ""
        shape: tuple[int, ...] = ()
        offsets: tuple[int, ...] = ()
        missing = set(_TENSOR_KEYS)
        for key in self._members():
            if key == "dtype":
                dtype = self._string()
            elif key == "shape":
                shape = self._integers(name, key)
            elif key == "data_offsets":
                offsets = self._integers(name, key)
            else:
                self._fail(f"tensor {_shown(name)} has an unknown key {_shown(key)}", tensor=name, key=key)
            missing.remove(key)
        if missing:
            self._fail(f"tensor {_shown(name)} lacks {', '.join(sorted(missing))}", tensor=name)
        if dtype not in DTYPES:
            self._fail(f"tensor {_shown(name)} has the unknown dtype {_shown(dtype)}", tensor=name, key="dtype")
        if len(offsets) != 2:
            self._fail(
                f"tensor {_shown(name)} needs two data_offsets, not {len(offsets)}", tensor=name, key="data_offsets"
            )
        begin, end = offsets
        self._check_size(name, dtype, shape, end - begin)
        return TensorInfo(name, dtype, shape, header_bytes + begin, header_bytes + end)

    def _check_size(self, name: str, dtype: str, shape: tuple[int, ...], size_bytes: int) -> None:
        bits = _size_bits(dtype, shape)
        if bits is None:
            self._fail(f"the size of tensor {_shown(name)} overflows 63 bits", tensor=name, key="shape")
        if bits % 8:
            self._fail(
                f"tensor {_shown(name)} of {dtype} {list(shape)} does not fill whole bytes", tensor=name, key="shape"
            )
        if bits // 8 != size_bytes:
            self._fail(
                f"tensor {_shown(name)} of {dtype} {list(shape)} needs {bits // 8} bytes, "
                f"but its data_offsets span {size_bytes}",
                tensor=name,
                key="data_offsets",
            )

    def _members(self) -> Iterator[str]:
        """The keys of the object at the cursor. The caller reads each value before it asks for the next key."""
        seen: set[str] = set()
        self._expect("{")
        if self._accept("}"):
            return
        while True:
            key = self._string()
            if key in seen:
                self._fail(f"the key {_shown(key)} appears twice", key=key)
            seen.add(key)
            self._expect(":")
            yield key
            if self._accept("}"):
                return
            self._expect(",")

    def _string(self) -> str:
        self._skip_space()
        if not self._text.startswith('"', self._at):
            self._fail(f"a string is expected at character {self._at}")
        try:
            value, self._at = _DECODER.raw_decode(self._text, self._at)
            value.encode()
        except (JSONDecodeError, UnicodeEncodeError):
            self._fail(f"the string at character {self._at} is broken")
        return str(value)

    def _integers(self, tensor: str, key: str) -> tuple[int, ...]:
        self._skip_space()
        match = _INTEGERS.match(self._text, self._at)
        if match is None:
            self._fail(
                f"{key} of tensor {_shown(tensor)} is not a list of at most {_MAX_DIMENSIONS} non-negative integers",
                tensor=tensor,
                key=key,
            )
        self._at = match.end()
        return tuple(map(int, match[1].split(","))) if match[1] else ()

    def _expect(self, char: str) -> None:
        if not self._accept(char):
            self._fail(f"{char!r} is expected at character {self._at}")

    def _accept(self, char: str) -> bool:
        self._skip_space()
        if not self._text.startswith(char, self._at):
            return False
        self._at += 1
        return True

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        if match is not None:
            self._at = match.end()

    def _fail(self, what: str, **fields: str) -> NoReturn:
        _refuse(self._path, f"in its header, {what}", **{key: value[:200] for key, value in fields.items()})


def _size_bits(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bits of a tensor; None where counting them overflows, and an extent of 0 does not hide that.

    numpy and torch count as we do, and make no tensor of such a shape, however empty.
    """
    bits, elements = DTYPES[dtype].bits, 1
    for extent in shape:
        elements *= extent or 1
        if elements * bits > _MAX_BITS:
            return None
    return 0 if 0 in shape else elements * bits


def _read_plain(text: str, at: int, header_bytes: int) -> list[TensorInfo] | None:
    """The tensors, in the order of their bytes, if all of ``text`` from ``at`` is a list of plain and valid entries."""
    if _PLAIN_ENTRY.match(text, at) is None:
        return None
    # One flat list, of what stands between two entries and of an entry's groups: of a tuple for each entry, Python's
    # garbage collector would take notice, and walk through the whole process.
    parts = _PLAIN_ENTRY.split(text[at:])
    between, names, kinds, from_texts, to_texts = (parts[group :: _PLAIN_ENTRY.groups + 1] for group in range(5))
    if any(between) or text.endswith(","):  # only the last entry can end with the brace
        return None
    if len(set(names)) != len(names) or _METADATA in names:
        return None
    ends = [header_bytes + offset for offset in map(int, to_texts)]
    in_order = from_texts[1:] == to_texts[:-1]
    begins = [header_bytes + int(from_texts[0]), *ends[:-1]]
    if not in_order:
        begins = [header_bytes + offset for offset in map(int, from_texts)]
    known = {kind: _plain_kind(kind) for kind in set(kinds)}
    alike = list(map(known.__getitem__, kinds))
    if any(map(ne, map(_SIZE, alike), map(sub, ends, begins))):
        return None
    rows = zip(names, map(_DTYPE, alike), map(_SHAPE, alike), begins, ends, strict=True)
    infos = list(map(_NEW_INFO, rows))
    if not in_order:
        infos.sort(key=_PLACE)
    return infos


_DTYPE, _SHAPE, _SIZE = map(itemgetter, range(3))


def _plain_kind(kind: str) -> tuple[str, tuple[int, ...], int | None]:
    """Dtype, shape, and the bytes of such a tensor; None, which equals no size, if that is not valid."""
    dtype, _, rest = kind.partition('"')
    match = _INTEGERS.fullmatch(rest[rest.index("[") :] + "]")
    if match is None or dtype not in DTYPES:
        return dtype, (), None
    shape = tuple(map(int, match[1].split(","))) if match[1] else ()
    bits = _size_bits(dtype, shape)
    return dtype, shape, None if bits is None or bits % 8 else bits // 8


def _check_cover(header: Header, file_size_bytes: int, path: str) -> None:
    """The tensors follow one another without overlap or hole, from the end of the header to the end of the file."""
    infos = header.tensors.values()
    ends = [header.header_bytes, *map(_END, infos)]
    if ends[-1] == file_size_bytes and ends[:-1] == list(map(_BEGIN, infos)):
        return
    expected = header.header_bytes
    for info in infos:
        if info.begin != expected:
            what = "overlaps the one before it" if info.begin < expected else "leaves a hole before it"
            _refuse(path, f"tensor {_shown(info.name)} {what}", tensor=info.name[:200], key="data_offsets")
        expected = info.end
    if expected != file_size_bytes:
        what = "longer" if file_size_bytes > expected else "shorter"
        _refuse(path, f"it has {file_size_bytes} bytes, {what} than the {expected} that its header describes")
