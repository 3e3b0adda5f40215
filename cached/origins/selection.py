"""Which objects of an origin make up a model, and in which order they come. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

from cached.errors import InvalidRequestError, NotFoundError
from cached.origins.base import OriginObject
from cached.units import MIB, format_size

FORMATS = ("auto", "safetensors", "gguf", "all")
"""``auto`` takes safetensors if there are any, else GGUF, else what there is; ``all`` leaves nothing out."""

_LARGE_BYTES = 64 * MIB  # a file of unknown kind and this size comes with the weights, not before them
_OTHER_FORMATS = (
    ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot", ".tflite", ".mlmodel", ".keras",
    ".npz", ".pkl", ".pickle",
)  # fmt: skip
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_OTHER_INDEX = re.compile(r"(pytorch_model|flax_model|tf_model|diffusion_pytorch_model).*\.index\.json")
_OTHER_FOLDERS = {"original", "onnx", "openvino", "coreml", "tf", "flax", "metal"}
_TRAINING = re.compile(
    r"optimizer(\.\w+)?\.(pt|bin|safetensors)|scheduler\.pt|rng_state.*\.pth|training_args\.bin|trainer_state\.json"
)
_TRAINING_FOLDERS = re.compile(r"(checkpoint-|global_step)\d+|runs")
_UNNEEDED = (
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".mov", ".wav", ".mp3", ".pdf", ".ipynb", ".parquet",
    ".arrow", ".csv", ".zip", ".tar", ".gz", ".tgz",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".gguf", *_OTHER_FORMATS)


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of a model, small ones first, then weights in the order of their shards; and what to tell people."""

    files: tuple[OriginObject, ...]
    notes: tuple[str, ...]


class _Rule(NamedTuple):
    why: str
    label: Callable[[str], str]
    leaves_out: Callable[[str], bool]


def select(
    items: Sequence[OriginObject],
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    weights_format: str = "auto",
    source: str = "",
) -> Selection:
    """What an engine needs of ``items``. ``source``: their URI, for advice.

    ``include`` and ``exclude`` are patterns on the whole relative path, in which ``*`` also matches ``/``; with
    ``include`` nothing else is looked at, and exclude wins over it. Then hidden files, media and archives are left out,
    and what holds the same weights in another format. Raises NotFoundError when nothing is left, saying what was there
    and what left it out, and InvalidRequestError for an unknown format.
    """
    if weights_format not in FORMATS:
        raise InvalidRequestError(
            f"{weights_format!r} is not a format of weights", hint=f"write one of: {', '.join(FORMATS)}", value="format"
        )
    notes: list[str] = []
    kept = [item for item in items if not include or _matches(item.path, include)]
    if len(kept) < len(items):
        notes.append(_left_out(kept, items, f"they match no include pattern ({', '.join(include)})"))
    kept = _apply(_Rule("excluded", _pattern_label(exclude), lambda path: _matches(path, exclude)), kept, notes)
    if weights_format != "all":
        kept = _apply(_Rule("engines do not need them", _kind, _is_unneeded), kept, notes)
        for rule in _format_rules([item.path for item in kept], weights_format):
            kept = _apply(rule, kept, notes)
    if weights_format in {"auto", "safetensors"} and (pickles := _only_pickles([item.path for item in kept])):
        raise _refused(pickles, source)
    if not kept or not _has_format([item.path for item in kept], weights_format):
        raise _nothing_left(items, notes, weights_format)
    notes.extend(_warnings(kept))
    return Selection(files=tuple(sorted(kept, key=_order)), notes=tuple(notes))


def _format_rules(paths: Sequence[str], weights_format: str) -> list[_Rule]:
    """What is left out because the weights are there in a better format."""
    has_safetensors = any(path.endswith(".safetensors") and not _is_aside(path) for path in paths)
    has_gguf = any(path.endswith(".gguf") for path in paths)
    if weights_format == "gguf" or (weights_format == "auto" and has_gguf and not has_safetensors):
        why = "GGUF files are there" if weights_format == "auto" else "the format is set to gguf"
        return [_Rule(why, _kind, lambda path: path.endswith(".safetensors") or _is_other_format(path, whole=True))]
    if not has_safetensors:
        return []
    folders = {_folder(path) for path in paths if path.endswith(".safetensors") and not _is_consolidated(path)}
    rules = [_Rule("safetensors are there", _kind, lambda path: _is_duplicate(path, folders))]
    why = "safetensors are there; set the format to gguf to have them instead"
    rules.append(_Rule(why, _kind, lambda path: path.endswith(".gguf")))
    return rules


def _is_duplicate(path: str, folders: set[str]) -> bool:
    """Whether the same weights are beside it, or it is in a folder that is known to hold a copy.

    A part of a pipeline (sentence-transformers' ``2_Dense``) may have nothing but a ``.bin`` while the rest has
    safetensors: that one is needed.
    """
    if _is_consolidated(path) and path.endswith(".safetensors"):
        return _folder(path) in folders
    return _is_other_format(path, whole=_folder(path) in folders)


def _is_other_format(path: str, *, whole: bool) -> bool:
    name = path.rpartition("/")[2]
    return _is_aside(path) or (whole and (name.endswith(_OTHER_FORMATS) or bool(_OTHER_INDEX.fullmatch(name))))


def _is_aside(path: str) -> bool:
    """Whether it is a copy of the model in a folder known for that, or state of its training."""
    *folders, name = path.split("/")
    return bool(_TRAINING.fullmatch(name)) or any(
        folder.lower() in _OTHER_FOLDERS or _TRAINING_FOLDERS.fullmatch(folder) for folder in folders
    )


def _is_consolidated(path: str) -> bool:
    return path.rpartition("/")[2].startswith("consolidated")


def _is_unneeded(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/")) or path.lower().endswith(_UNNEEDED)


def is_pickle(path: str) -> bool:
    """Whether the name is that of a checkpoint of PyTorch's own format, which is a pickle."""
    return path.endswith(_PICKLES)


def is_training_state(path: str) -> bool:
    """Whether it is state of training, which no engine needs."""
    return bool(_TRAINING.fullmatch(path.rpartition("/")[2]))


def is_companion(path: str) -> bool:
    """Whether a model whose weights are converted takes it along as it is."""
    name = path.rpartition("/")[2]
    other = path.endswith(_OTHER_FORMATS) or bool(_OTHER_INDEX.fullmatch(name))
    return not other and not _is_unneeded(path) and not is_training_state(path)


def _only_pickles(paths: Sequence[str]) -> list[str]:
    """The pickles, if nothing else among the paths holds weights."""
    pickles = [path for path in paths if is_pickle(path) and not is_training_state(path)]
    others = any(path.endswith((*_WEIGHTS,)) and not is_pickle(path) and not _is_aside(path) for path in paths)
    return [] if others else pickles


def _refused(pickles: Sequence[str], source: str) -> InvalidRequestError:
    """With the command that converts them: a folder's neighbour, or what was downloaded, which then has to go up."""
    if source.startswith("file:///"):
        folder = source.removeprefix("file://").rstrip("/")
        todo = f"cached convert {folder} --to {folder}-safetensors; and pull file://{folder}-safetensors"
    else:
        name = source.rstrip("/").rpartition("/")[2].partition("@")[0] or "DIR"
        todo = f"cached convert {source or 'DIR'} --to {name}-safetensors; and: cached push {name}-safetensors URI"
    more = f" and {len(pickles) - 1} more" if len(pickles) > 1 else ""
    return InvalidRequestError(
        f"the weights are there as pickles alone ({pickles[0]}{more}), which may run code when they are loaded and "
        "cannot be shared as tensors",
        hint=f"convert them to safetensors: {todo}. To cache the files as they are, set the model's format to all in "
        "the catalog",
        value=pickles[0],
    )


def _has_format(paths: Iterable[str], weights_format: str) -> bool:
    wanted = {"safetensors": ".safetensors", "gguf": ".gguf"}.get(weights_format)
    return wanted is None or any(path.endswith(wanted) for path in paths)


def _warnings(kept: Sequence[OriginObject]) -> list[str]:
    notes = []
    paths = [item.path for item in kept]
    gguf = [path for path in paths if path.endswith(".gguf") and not re.search(r"-\d{5}-of-\d{5}\.gguf$", path)]
    if len(gguf) > 1:
        notes.append(
            f"{len(gguf)} GGUF files are kept; name the ones you need with an include pattern, such as '*Q4_K_M*'"
        )
    if not any(path.endswith((".safetensors", ".gguf")) for path in paths):
        others = [path for path in paths if path.endswith(_OTHER_FORMATS)]
        if others:
            notes.append(
                f"there are no safetensors: {len(others)} files such as {others[0]} are cached as they are, but cannot "
                "be loaded as tensors"
            )
    return notes


def _apply(rule: _Rule, items: list[OriginObject], notes: list[str]) -> list[OriginObject]:
    out = [item for item in items if rule.leaves_out(item.path)]
    groups: dict[str, list[OriginObject]] = {}
    for item in out:
        groups.setdefault(rule.label(item.path), []).append(item)
    for label, group in sorted(groups.items()):
        size = format_size(sum(item.size_bytes for item in group))
        files = "file" if len(group) == 1 else "files"
        notes.append(f"left out {len(group)} {label} {files}, {size}: {rule.why}")
    return [item for item in items if not rule.leaves_out(item.path)]


def _left_out(kept: Sequence[OriginObject], items: Sequence[OriginObject], why: str) -> str:
    count = len(items) - len(kept)
    size_bytes = sum(item.size_bytes for item in items) - sum(item.size_bytes for item in kept)
    return f"left out {count} {'file' if count == 1 else 'files'}, {format_size(size_bytes)}: {why}"


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _pattern_label(patterns: Sequence[str]) -> Callable[[str], str]:
    return lambda path: next((pattern for pattern in patterns if fnmatchcase(path, pattern)), "")


def _kind(path: str) -> str:
    """``original/``, ``.*``, ``*.bin``: how a person names a group of files."""
    parts = path.split("/")
    for part in parts[:-1]:
        if part.startswith(".") or part.lower() in _OTHER_FOLDERS or _TRAINING_FOLDERS.fullmatch(part):
            return f"{part}/"
    name = parts[-1]
    if name.startswith("."):
        return "hidden"
    if name.startswith("consolidated"):
        return "consolidated*"
    if _OTHER_INDEX.fullmatch(name) or _TRAINING.fullmatch(name):
        return name
    return f"*.{name.rpartition('.')[2]}"


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _order(item: OriginObject) -> tuple[bool, list[tuple[bool, int, str]]]:
    """Small files, then weights; by name, with numbers by their value."""
    heavy = item.path.endswith(_WEIGHTS) or item.size_bytes >= _LARGE_BYTES
    parts = re.findall(r"\d+|\D+", item.path)
    return heavy, [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


def _nothing_left(items: Sequence[OriginObject], notes: Sequence[str], weights_format: str) -> NotFoundError:
    there = Counter(_kind(item.path) for item in items)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(there.items())) or "nothing"
    wanted = f"{weights_format} files" if weights_format in {"safetensors", "gguf"} else "files"
    why = "; ".join(notes)
    return NotFoundError(
        f"the model has no {wanted}: at the origin there is {listed}" + (f"; {why}" if why else ""),
        hint="look at the source, and at the format and the include and exclude patterns of the catalog",
        path="",
    )
