"""Which files of a folder are checkpoints, what becomes of each, and what goes along. Reads names and indexes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cached.errors import IntegrityError, InvalidRequestError, NotFoundError
from cached.origins.selection import is_companion, is_pickle, is_training_state
from cached.refs import check_path

_INDEX = ".bin.index.json"
_MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Pickled files that are one set of tensors. ``output``: the path of the safetensors, without its suffix."""

    files: tuple[Path, ...]
    output: str

    @property
    def size_bytes(self) -> int:
        """Of all files."""
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True, slots=True)
class Plan:
    """``companions``: path within the model → file, to be copied; ``left_out``: what is neither."""

    checkpoints: tuple[Checkpoint, ...]
    companions: dict[str, Path]
    left_out: tuple[str, ...]


def plan_conversion(source: Path) -> Plan:
    """What is to be done with a folder or one file. Raises NotFoundError, InvalidRequestError, IntegrityError."""
    if source.is_file():
        return Plan((Checkpoint((source,), _stem([source.name])),), {}, ())
    files = {path.relative_to(source).as_posix(): path for path in files_below(source)}
    pickles = [path for path in files if is_pickle(path) and not is_training_state(path)]
    if not pickles:
        raise NotFoundError(
            f"{source} has no .bin, .pt, .pth or .ckpt files to convert",
            hint="give the folder of a checkpoint, or one file of it",
            path=source,
        )
    folders: dict[str, list[str]] = {}
    for path in sorted(pickles):
        folders.setdefault(path.rpartition("/")[0], []).append(path)
    checkpoints = tuple(_checkpoint(source, folder, paths) for folder, paths in folders.items())
    companions = {path: file for path, file in files.items() if is_companion(path)}
    taken = {file for checkpoint in checkpoints for file in checkpoint.files}
    left_out = sorted(path for path, file in files.items() if path not in companions and file not in taken)
    return Plan(checkpoints, companions, tuple(path for path in left_out if not path.endswith(_INDEX)))


def files_below(source: Path) -> Iterator[Path]:
    """Regular files, through links to files (a hub's snapshot is made of them); hidden ones are left out.

    A link that leads nowhere, or to a folder, is an error and not skipped, as in LocalOrigin: a model with a file
    silently missing is worse than none.
    """
    if not source.is_dir():
        raise NotFoundError(f"{source} is not there", hint="give the folder of a checkpoint, or one file", path=source)
    for place, folders, names in os.walk(source, onerror=_refuse_unread):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in (*folders, *names):
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.is_file():
                check_path(path.relative_to(source).as_posix())
                yield path
            elif path.is_symlink():
                raise _bad_link(path, source)


def _refuse_unread(error: OSError) -> None:
    raise InvalidRequestError(
        f"{error.filename} cannot be read: {error.strerror}",
        hint="let the user of this command read every folder",
        value=error.filename,
    ) from error


def _bad_link(path: Path, source: Path) -> InvalidRequestError:
    why = "it leads to a folder" if path.is_dir() else "it leads to no file"
    return InvalidRequestError(
        f"{path.relative_to(source)} in {source} is a symbolic link that is not followed: {why}",
        hint="replace it by what it leads to, or remove it",
        value=path,
    )


def _checkpoint(source: Path, folder: str, paths: list[str]) -> Checkpoint:
    """Of one folder: what its index names, if it has one, else every pickle in it."""
    names = [path.rpartition("/")[2] for path in paths]
    indexes = sorted((source / folder).glob(f"*{_INDEX}"))
    if len(indexes) == 1:
        named = _indexed(indexes[0])
        missing = [name for name in named if name not in names]
        if missing:
            raise IntegrityError(
                f"{indexes[0]} names {missing[0]}, which is not there",
                hint="the checkpoint is not whole: get the missing files",
                path=missing[0],
                check="index",
                expected=missing[0],
                found="nothing",
            )
        names = named
    output = _stem(names)
    return Checkpoint(tuple(source / folder / name for name in names), f"{folder}/{output}" if folder else output)


def _indexed(index: Path) -> list[str]:
    try:
        with index.open("rb") as file:
            names = sorted(set(json.loads(file.read(_MAX_INDEX_BYTES))["weight_map"].values()))
        return [check_path(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError(
            f"{index} is not the index of a checkpoint: {error!r}", hint="remove or correct it", value=index
        ) from error


def _stem(names: list[str]) -> str:
    """What engines look for: ``pytorch_model`` becomes ``model``; other names stay, if there is one."""
    stems = {name.rpartition(".")[0].partition("-0")[0] for name in names}
    stem = next(iter(stems)) if len(stems) == 1 else "model"
    return "model" if stem in {"pytorch_model", "consolidated"} else stem
