"""What we say of a file, what the reference library says, and whether that may be so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import safetensors

from cached_client.dtypes import DTYPES
from cached_client.errors import FormatError
from cached_client.safetensors_header import LENGTH_BYTES, MAX_NAME_CHARACTERS, header_length, parse_header

_METADATA = "__metadata__"
_KEYS = {"dtype", "shape", "data_offsets"}


class DisagreementError(AssertionError):
    """We took what the reference refuses, read it otherwise, or refused it for no listed reason."""


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON, with its keys as often as they come."""


def judge(content: bytes) -> str:
    """``accepted``, ``refused`` (by both), or the kind of what only we refuse. Raises DisagreementError."""
    try:
        theirs = {
            name: (view["dtype"], tuple(view["shape"]), bytes(view["data"]))
            for name, view in safetensors.deserialize(content)
        }
    except safetensors.SafetensorError:
        theirs = None
    try:
        header = parse_header(content, len(content), path="f")
    except FormatError as error:
        return "refused" if theirs is None else _only_ours(content, error)
    if theirs is None:
        raise DisagreementError("only we accept it")
    ours = {name: (info.dtype, info.shape, content[info.begin : info.end]) for name, info in header.tensors.items()}
    if ours != theirs:
        raise DisagreementError(f"we read {ours}, the reference {theirs}")
    metadata = dict(dict(_document(content)).get(_METADATA, ()))
    if header.metadata != metadata:
        raise DisagreementError(f"we read the metadata {header.metadata}, it is {metadata}")
    return "accepted"


def _only_ours(content: bytes, error: FormatError) -> str:
    """The listed kind that the error names and that the header is of indeed."""
    if len(error.message) > 2000 or any(len(value) > 1000 for value in error.fields.values()):
        raise DisagreementError(f"an error of {len(error.message)} characters")
    named = [kind for kind, (says, _) in STRICTER.items() if re.search(says, error.message)]
    document = _document(content)
    if _has_duplicates(document):
        return "a key twice"  # the reference sees the last one only; of an earlier one anything may be wrong
    if not any(STRICTER[kind][1](document) for kind in named):
        raise DisagreementError(f"only we refuse it: {error.message}")
    return named[0]


def _document(content: bytes) -> Any:
    text = content[LENGTH_BYTES : LENGTH_BYTES + header_length(content, len(content))].decode()
    return json.loads(text, object_pairs_hook=_Pairs)


def _tensors(document: Any) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in document if name != _METADATA)


def _has_duplicates(document: Any) -> bool:
    objects = [document, *(value for _, value in document if isinstance(value, _Pairs))]
    return any(len({key for key, _ in pairs}) < len(pairs) for pairs in objects)


def _has_other_forms(document: Any) -> bool:
    for name, value in document:
        if not isinstance(value, _Pairs) or (name != _METADATA and not isinstance(dict(value).get("dtype"), str)):
            return True
    return False


def _shapes(document: Any) -> Iterator[tuple[str, list[int]]]:
    for _, value in _tensors(document):
        if isinstance(value, _Pairs):
            entry = dict(value)
            yield entry["dtype"], entry["shape"]


STRICTER: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "space before the brace": ("does not begin with", lambda document: True),  # the reference took it: what else was it
    "a key twice": ("appears twice", _has_duplicates),
    "an unknown key": (
        "unknown key",
        lambda document: any(isinstance(value, _Pairs) and set(dict(value)) - _KEYS for _, value in _tensors(document)),
    ),
    "control characters in a name": (
        "has control characters",
        lambda document: any(re.search(r"[\x00-\x1f\x7f-\x9f]", name) for name, _ in _tensors(document)),
    ),
    "a name too long": (
        r"has \d+ characters; \d+ are the most",
        lambda document: any(len(name) > MAX_NAME_CHARACTERS for name, _ in _tensors(document)),
    ),
    "too many dimensions": (
        "not a list of at most 64",
        lambda document: any(len(shape) > 64 for _, shape in _shapes(document)),
    ),
    "a shape that overflows": (
        "overflows 63 bits",
        lambda document: any(
            math.prod(extent or 1 for extent in shape) * DTYPES[dtype].bits >= 2**63
            for dtype, shape in _shapes(document)
        ),
    ),
    "another form of the same": ("'{' is expected|a string is expected|not a list of at most 64", _has_other_forms),
}
"""What only we refuse: how the error says so, and whether the parsed header is of that kind. As in docs/security.md."""
