"""What a selective attach has of a model: tensors, and files that are there whole. Nothing else may be read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached_client.errors import CacheError, InvalidRequestError, NotFoundError
from cached_client.safetensors_header import Header, TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cached_client._proto import cached_pb2 as pb


class Selected:
    """Of the daemon's answer. Immutable."""

    def __init__(self, message: pb.Selected, sizes_bytes: list[int]) -> None:
        """``sizes_bytes``: of the files by index. Raises CacheError for what cannot lie in them."""
        by_file: dict[int, dict[str, TensorInfo]] = {}
        for item in message.tensors:
            if item.file_index >= len(sizes_bytes) or not item.begin <= item.end <= sizes_bytes[item.file_index]:
                raise CacheError(f"the daemon placed the tensor {item.name!r} outside of its file")
            info = TensorInfo(item.name, item.dtype, tuple(item.shape), item.begin, item.end)
            by_file.setdefault(item.file_index, {})[item.name] = info
        self.files: frozenset[int] = frozenset(message.files)
        """Those that are there whole."""
        self.headers: dict[int, Header] = {index: Header(by_file[index], {}, 0) for index in sorted(by_file)}
        """By file, as if it had no other tensors."""
        self.sizes_bytes = sizes_bytes

    @property
    def indices(self) -> frozenset[int]:
        """Files of which anything is there."""
        return self.files | self.headers.keys()

    def ranges(self) -> list[tuple[int, int, int]]:
        """``(file index, offset, length)`` of all that is there."""
        tensors = [
            (index, info.begin, info.size_bytes)
            for index, header in self.headers.items()
            if index not in self.files
            for info in header.tensors.values()
        ]
        return [(index, 0, self.sizes_bytes[index]) for index in sorted(self.files)] + tensors


def left_out(what: str, name: str) -> NotFoundError:
    """A tensor or file that the selection does not have, whether or not the model does."""
    key = "tensor" if what == "tensor" else "path"
    return NotFoundError(
        f"the {what} {name!r} was left out by the selection of this attach, or the model has none of that name",
        hint="attach with a pattern that matches it, or without a selection; names() lists what is selected",
        **{key: name},
    )


def patterns(what: str, given: Iterable[str]) -> list[str]:
    """Patterns of a caller. Raises InvalidRequestError for a bare text, whose letters would be taken for patterns."""
    listed = list(given)
    if isinstance(given, str) or not all(listed):
        raise InvalidRequestError(
            f"{what} must be a list of patterns, not {given!r}", hint=f"for example {what}=['model.layers.0.*']"
        )
    return listed


def tensor_names(given: Iterable[str]) -> frozenset[str]:
    """Names of a caller. Raises InvalidRequestError for a bare text, whose letters would be taken for names."""
    if isinstance(given, str):
        raise InvalidRequestError(
            f"names must be a list of names, not {given!r}", hint=f"for example names=[{given!r}]", value=given
        )
    return frozenset(given)
