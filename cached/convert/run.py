"""Converts a checkpoint: a sandboxed process for each, then everything is put in place by one rename."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cached.convert.checkpoint import Checkpoint, plan_conversion
from cached.convert.sandbox import Measure
from cached.errors import CachedError, IntegrityError, InvalidRequestError, MoverError

_KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "VIRTUAL_ENV")
"""Nothing else of it reaches a process that reads a pickle: no credentials."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the process is told. ``folder``: where it may write."""

    files: list[str]
    folder: str
    max_shard_bytes: int
    drop_shared: bool


@dataclass(slots=True)
class Converted:
    """What came of it. ``files``: safetensors by their path in ``folder``, with the names of their tensors."""

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    tensor_bytes: int = 0
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    sandbox: list[Measure] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who is told: of bytes that were written and compared, and of the sandbox, before anything is read."""

    on_bytes: Callable[[int], None] = lambda _count: None
    on_sandbox: Callable[[list[Measure]], None] = lambda _measures: None


def convert(
    source: Path, folder: Path, *, max_shard_bytes: int, drop_shared: bool, env: Mapping[str, str], watcher: Watcher
) -> Converted:
    """Makes ``folder``, which may not be there yet: whole, or not at all.

    ``on_sandbox`` may raise, to refuse a sandbox that is not whole. Raises InvalidRequestError for what is not only
    weights or cannot be safetensors, IntegrityError for what is truncated or damaged, NotFoundError, NoRoomError.
    """
    if folder.exists():
        raise InvalidRequestError(
            f"{folder} is there already", hint="name a folder that is not there yet", value=folder
        )
    plan = plan_conversion(source)
    partial = folder.parent / f".{folder.name}.{secrets.token_hex(6)}.part"
    with written(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    made = Converted(folder, left_out=list(plan.left_out))
    try:
        for checkpoint in plan.checkpoints:
            order = Order(
                [str(file.resolve()) for file in checkpoint.files], str(partial.resolve()), max_shard_bytes, drop_shared
            )
            _place(partial, checkpoint, _child(order, env, made, watcher), made)
        with written(folder):
            for path, file in sorted(plan.companions.items()):
                _copy(file, partial, path, made)
            _sync(partial)
            partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return made


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raises InvalidRequestError with what the system says against writing ``folder``."""
    try:
        yield
    except OSError as error:
        raise InvalidRequestError(
            f"{folder} cannot be written: {error}",  # it names the file, which may be one of the source's
            hint="name a folder to be made where this user may write, with room for the model",
            value=folder,
        ) from error


def _child(order: Order, env: Mapping[str, str], made: Converted, watcher: Watcher) -> list[dict[str, Any]]:
    """The shards that the process wrote. Raises what it tells, and IntegrityError if it dies."""
    done: dict[str, Any] = {}
    with subprocess.Popen(
        [sys.executable, "-m", "cached.convert.child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, close_fds=True,
        env={name: env[name] for name in _KEPT_ENVIRONMENT if name in env} | {"PYTHONDONTWRITEBYTECODE": "1"},
        cwd="/", start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None  # noqa: S101 asked for above
        assert process.stdout is not None  # noqa: S101
        assert process.stderr is not None  # noqa: S101
        try:
            process.stdin.write(json.dumps(asdict(order)))
            process.stdin.close()
            for line in process.stdout:
                done = _heard(json.loads(line), made, watcher) or done
            said = process.stderr.read()
        except BaseException:
            process.kill()
            raise
    if process.returncode or not done:
        raise IntegrityError(
            f"the process that read {order.files[0]} ended with {process.returncode}: {said.strip()[-500:]}",
            hint="the file may be made to do that; if it is yours, look at the memory of this host",
            path=order.files[0],
            check="process",
            expected="0",
            found=process.returncode,
        )
    made.notes += [str(note) for note in done["notes"]]
    shards: list[dict[str, Any]] = done["shards"]
    return shards


def _heard(told: dict[str, Any], made: Converted, watcher: Watcher) -> dict[str, Any] | None:
    if "error" in told:
        raise CachedError.from_dict(told["error"])
    if "sandbox" in told:
        made.sandbox = [Measure(**item) for item in told["sandbox"]]
        watcher.on_sandbox(made.sandbox)
    elif "written_bytes" in told:
        watcher.on_bytes(int(told["written_bytes"]))
    elif "done" in told:
        done: dict[str, Any] = told["done"]
        return done
    else:
        raise MoverError(f"the process that converts told something else: {str(told)[:200]}")
    return None


def _place(partial: Path, checkpoint: Checkpoint, shards: list[dict[str, Any]], made: Converted) -> None:
    """Gives the shards the names that engines look for, and writes their index where there are several."""
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        of = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        path = f"{checkpoint.output}{of}.safetensors"
        target = partial / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise InvalidRequestError(
                f"two checkpoints would become {path}", hint="convert them one by one", value=path
            )
        (partial / str(shard["file"])).rename(target)
        made.files[path] = shard["names"]
        made.tensor_bytes += shard["size_bytes"]
        weight_map |= dict.fromkeys(shard["names"], target.name)
    if len(shards) > 1:
        total_bytes = sum(shard["size_bytes"] for shard in shards)
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (partial / f"{checkpoint.output}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _copy(file: Path, partial: Path, path: str, made: Converted) -> None:
    if path in made.files:
        raise InvalidRequestError(
            f"the folder has {path} already", hint="there is nothing to convert: use it as it is", value=path
        )
    target = partial / path
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
    made.copied.append(path)


def _sync(partial: Path) -> None:
    for place, _, names in os.walk(partial, topdown=False):
        for path in (*(os.path.join(place, name) for name in names), place):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
