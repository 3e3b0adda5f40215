"""The process that reads a pickle: ``python -m cached.convert.child``. The only user of torch in this distribution.

Takes one order on standard input, enters the sandbox, and tells on standard output what it did, one JSON object a line.
It reads with ``weights_only``, which calls nothing that a pickle names but the makers of tensors.
"""

from __future__ import annotations

import json
import os
import pickle  # only for the type of torch's error
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from cached.convert.sandbox import enter
from cached.errors import CachedError, IntegrityError, InvalidRequestError, NoRoomError

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_FREE_BYTES = 64 << 20
_MAX_GROWTH = 4
_NO_ROOM = {27, 28, 122}  # EFBIG, ENOSPC, EDQUOT


def main() -> int:
    """Converts the files of one checkpoint into ``folder``; see ``run.Order`` for the order."""
    order = json.loads(sys.stdin.read())
    largest = max(sum(os.path.getsize(file) for file in order["files"]), int(order["max_shard_bytes"])) + _FREE_BYTES
    _tell(sandbox=[asdict(item) for item in enter(order["folder"], largest_file_bytes=largest)])
    try:
        _tell(done=_Conversion(order).run())
    except CachedError as error:
        _tell(error=error.to_dict())
    except MemoryError:
        _tell(error=NoRoomError("there is not enough memory", hint="give a smaller --max-shard-size").to_dict())
    return 0


def _tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)  # noqa: T201 the protocol with the process that started this one


class _Conversion:
    """From pickled files to safetensors shards, each compared once it was written."""

    def __init__(self, order: Mapping[str, Any]) -> None:
        try:
            import torch
            from safetensors import safe_open
            from safetensors.torch import save_file
        except ImportError as error:
            raise InvalidRequestError(
                f"conversion needs torch and safetensors, and they are not both installed: {error}",
                hint="install them beside cached: pip install 'cached[convert]'",
                value="torch",
            ) from error
        torch.set_num_threads(1)
        self._torch = torch
        self._save_file, self._safe_open = save_file, safe_open
        self._files: list[str] = order["files"]
        self._folder: str = order["folder"]
        self._shard_bytes = int(order["max_shard_bytes"])
        self._drop_shared = bool(order["drop_shared"])
        self._seen: dict[str, str] = {}
        self._shards: list[dict[str, Any]] = []
        self._notes: list[str] = []
        # Views of the same few bytes could fill any memory and any disk.
        self._left_bytes = _MAX_GROWTH * sum(os.path.getsize(file) for file in self._files) + _FREE_BYTES

    def run(self) -> dict[str, Any]:
        """Writes the shards; what they hold."""
        pending: dict[str, Any] = {}
        pending_bytes = 0
        for file in self._files:
            for name, tensor in self._tensors(file):
                size_bytes = self._counted(name, tensor)
                if pending and pending_bytes + size_bytes > self._shard_bytes:
                    self._write(pending)
                    pending, pending_bytes = {}, 0
                pending[name] = tensor
                pending_bytes += size_bytes
        if pending:
            self._write(pending)
        if not self._shards:
            raise InvalidRequestError("there are no tensors in it", hint="look whether it is a checkpoint", value="")
        return {"shards": self._shards, "notes": self._notes}

    def _counted(self, name: str, tensor: Any) -> int:
        size_bytes = int(tensor.numel() * tensor.element_size())
        self._left_bytes -= size_bytes
        if self._left_bytes < 0:
            raise InvalidRequestError(
                f"its tensors would take more than {_MAX_GROWTH} times the room of the checkpoint: {name} alone is "
                f"{size_bytes} bytes",
                hint="they are views of the same few bytes, which safetensors has not; it may be made to fill disks",
                value=name,
            )
        return size_bytes

    def _tensors(self, file: str) -> Iterator[tuple[str, Any]]:
        """Each tensor with its name; what shares memory is told or left out, as was asked for."""
        first: dict[tuple[Any, ...], str] = {}
        for name, tensor in self._state(file).items():
            self._check(file, name, tensor)
            if name in self._seen:
                raise InvalidRequestError(
                    f"{file} and {self._seen[name]} both have a tensor {name}",
                    hint="they are shards of ranks, or several models: convert one file, or merge them first",
                    value=name,
                )
            self._seen[name] = file
            where = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            same = first.setdefault((*where, tensor.dtype), name) if tensor.numel() else name
            if same != name:
                done = (
                    "is left out, as the same as" if self._drop_shared else "is written of its own, though the same as"
                )
                self._notes.append(f"{name} {done} {same}")
                if self._drop_shared:
                    continue
            yield name, tensor.detach()

    def _state(self, file: str) -> Mapping[str, Any]:
        loaded = self._load(file)
        if isinstance(loaded, self._torch.Tensor):
            return {"tensor": loaded}
        if not isinstance(loaded, Mapping):
            raise InvalidRequestError(
                f"{file} is a {type(loaded).__name__}, not a table of tensors",
                hint="save the model's state_dict(), and convert that",
                value=file,
            )
        for wrapper in _WRAPPERS:
            inner = loaded.get(wrapper)
            if isinstance(inner, Mapping) and inner:
                others = [str(key) for key in loaded if key != wrapper]
                if others:
                    self._notes.append(
                        f"of {os.path.basename(file)} only {wrapper!r} is taken, not {', '.join(others)[:200]}"
                    )
                return inner
        return loaded

    def _load(self, file: str) -> Any:
        torch = self._torch
        try:
            try:
                return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                self._notes.append(f"{os.path.basename(file)} is of the old format, and was read into memory whole")
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            told = _first_sentence(str(error))
            raise (self._no_weights(file, told) if "global" in told.lower() else self._damaged(file, told)) from None
        except (RuntimeError, EOFError, ValueError, OSError, KeyError, AttributeError, TypeError) as error:
            raise self._damaged(file, _first_sentence(str(error)) or type(error).__name__) from None

    def _damaged(self, file: str, why: str) -> IntegrityError:
        return IntegrityError(
            f"{file} cannot be read: {why}",
            hint="it is truncated or damaged, or no checkpoint of PyTorch: get it again",
            path=file,
            check="torch.load",
            expected="a checkpoint",
            found=why,
        )

    def _no_weights(self, file: str, why: str) -> IntegrityError:
        return IntegrityError(
            f"{file} holds more than weights, and was not loaded: {why}",
            hint="do not load it in any other way unless you trust whoever made it as much as your own code; ask "
            "them for safetensors",
            path=file,
            check="weights_only",
            expected="tensors",
            found=why,
        )

    def _check(self, file: str, name: Any, tensor: Any) -> None:
        torch = self._torch
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise InvalidRequestError(
                f"{file} has something that is no tensor: {str(name)[:100]!r} is a {type(tensor).__name__}",
                hint="save the model's state_dict() alone, and convert that",
                value=str(name)[:100],
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_complex() or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else f"{tensor.dtype}, {tensor.layout}"
            raise InvalidRequestError(
                f"{name} in {file} cannot be written as safetensors: it is {kind}",
                hint="safetensors holds dense tensors of real numbers: convert it to one before it is saved",
                value=name,
            )

    def _write(self, tensors: Mapping[str, Any]) -> None:
        file = f"shard-{len(self._shards) + 1:05}.safetensors"
        path = os.path.join(self._folder, file)
        try:
            # What shares memory, or is not contiguous, has to be of its own.
            whole = {
                name: tensor.clone(memory_format=self._torch.contiguous_format) for name, tensor in tensors.items()
            }
            self._save_file(whole, path, metadata={"format": "pt"})
        except OSError as error:
            raise self._unwritable(path, error) from None
        except Exception as error:  # noqa: BLE001 safetensors' own errors have no other common base
            raise self._unwritable(path, error) from None
        del whole
        self._compare(path, tensors)
        size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        self._shards.append({"file": file, "names": list(tensors), "size_bytes": size_bytes})
        _tell(written_bytes=size_bytes)

    def _unwritable(self, path: str, error: Exception) -> CachedError:
        number = getattr(error, "errno", None)
        if number in _NO_ROOM or "No space" in str(error):
            return NoRoomError(f"{path} cannot be written: {error}", hint="make room on that disk")
        return InvalidRequestError(f"{path} cannot be written: {error}", hint="look at the disk", value=path)

    def _compare(self, path: str, tensors: Mapping[str, Any]) -> None:
        """Every bit of every tensor, read again from the file."""
        torch = self._torch
        with self._safe_open(path, framework="pt") as written:
            for name, tensor in tensors.items():
                found = written.get_tensor(name)
                same = found.dtype == tensor.dtype and found.shape == tensor.shape
                if not same or not torch.equal(_bits(torch, found), _bits(torch, tensor)):
                    raise IntegrityError(
                        f"{name} is not in {path} what it is in the checkpoint",
                        hint="the disk or the memory is damaged; nothing was put in place",
                        path=path,
                        check="compare",
                        expected=f"{tensor.dtype} {tuple(tensor.shape)}",
                        found=f"{found.dtype} {tuple(found.shape)}",
                    )


def _bits(torch: Any, tensor: Any) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _first_sentence(text: str) -> str:
    """What is wrong: how to load it all the same, which torch explains at length, is no advice."""
    lines = [line.strip() for line in text.replace("WeightsUnpickler error:", "\n").splitlines() if line.strip()]
    told = [line for line in lines if "GLOBAL" in line or "Unsupported" in line or "global" in line]
    return (told or lines or [""])[-1 if told else 0][:300]


if __name__ == "__main__":
    sys.exit(main())
