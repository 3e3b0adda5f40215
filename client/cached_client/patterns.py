"""Patterns of names, as attaches select tensors and files by them. Standard library only; the daemon uses it too.

They are those of a shell (``fnmatch``): ``*`` matches anything, dots and slashes too, ``?`` one character, ``[0-3]``
one of several, ``[!0-3]`` none of them. Case counts.
"""

from __future__ import annotations

import re
from fnmatch import translate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

INDEX_PATH = "model.safetensors.index.json"
"""Names the weight file of each tensor."""

WEIGHTS_SUFFIX = ".safetensors"
"""Of the files whose tensors are handed out."""

ANY_WEIGHTS_SUFFIX = (
    WEIGHTS_SUFFIX, ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".onnx_data", ".h5", ".msgpack", ".ot", ".tflite",
)  # fmt: skip
"""Of weights in whatever format: all other files of a model are small."""

_WILD = re.compile(r"[*?\[]")
_NEAR = 3


def is_wild(pattern: str) -> bool:
    """Whether it may match more than its own text."""
    return _WILD.search(pattern) is not None


def matched(patterns: Sequence[str], names: Collection[str]) -> tuple[list[str], list[int]]:
    """The names that some pattern matches, in their order, and the numbers of those patterns that match none."""
    known = names if isinstance(names, (set, dict, frozenset)) else set(names)
    found: set[str] = set()
    unmatched: list[int] = []
    for number, pattern in enumerate(patterns):
        hits = set(filter(re.compile(translate(pattern)).match, known)) if is_wild(pattern) else {pattern} & set(known)
        if not hits:
            unmatched.append(number)
        found |= hits
    return [name for name in names if name in found], unmatched


def nearest(pattern: str, names: Iterable[str]) -> list[str]:
    """A few names that begin as a pattern does, those that do so the longest; none where nothing agrees."""
    wild = _WILD.search(pattern)
    literal = pattern[: wild.start()] if wild else pattern
    alike = sorted((-_alike(literal, name), name) for name in names)
    return [name for length, name in alike[:_NEAR] if length]


def _alike(first: str, second: str) -> int:
    """How many characters they begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (one, other) in pairs if one != other), min(len(first), len(second)))


def weight_files(paths: Iterable[str], named: Collection[str]) -> list[str]:
    """The safetensors files of a model, in order: those that its index names (``named``), as far as they are there.

    Without any, those at the top of the model; without any there, all. So a repository that carries its weights twice
    (say, in its maker's own layout too) is read once.
    """
    weights = {path for path in paths if path.endswith(WEIGHTS_SUFFIX)}
    top = {path for path in weights if "/" not in path} or weights
    return sorted((weights & set(named)) or top)
