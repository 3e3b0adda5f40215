"""The tensors of an attached model as windows on its mappings, in the order in which their bytes arrive."""

from __future__ import annotations

from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING

from cached_client._ranges import PendingTensors
from cached_client.errors import IntegrityError
from cached_client.safetensors_header import TensorInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from cached_client._arrivals import Arrivals, Deadline
    from cached_client._index import TensorIndex

_RUN = 256
"""Tensors made at a time: enough that each costs little, few enough that the first one comes at once."""

_NAME = itemgetter(TensorInfo._fields.index("name"))


def tensors(
    arrivals: Arrivals, index: TensorIndex, wanted: frozenset[str] | None, deadline: Deadline, what: str
) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """Each tensor (of ``wanted``, or all) as soon as its bytes are there. Raises as `Arrivals.wait_for` and `view` do.

    What happens between two steps counts: bytes that were found damaged meanwhile are not handed out.
    """
    from cached_client.torch import tensor_from_view

    for file_index, infos, made, revocations in _runs(arrivals, index, wanted, deadline, what):
        for info, tensor in zip(infos, made or repeat(None), strict=False):
            if tensor is None or arrivals.revocations != revocations:
                yield info, tensor_from_view(_wait_view(arrivals, file_index, info, deadline), info)
            else:
                yield info, tensor


def all_tensors(arrivals: Arrivals, index: TensorIndex, deadline: Deadline, what: str) -> dict[str, torch.Tensor]:
    """All of them by name, as they arrived. Raises as `tensors` does."""
    from cached_client.torch import tensor_from_view

    found: dict[str, torch.Tensor] = {}
    for file_index, infos, made, _ in _runs(arrivals, index, None, deadline, what):
        if made is not None:
            found.update(zip(map(_NAME, infos), made, strict=True))
            continue
        for info in infos:
            found[info.name] = tensor_from_view(_wait_view(arrivals, file_index, info, deadline), info)
    return found


def _runs(
    arrivals: Arrivals, index: TensorIndex, wanted: frozenset[str] | None, deadline: Deadline, what: str
) -> Iterator[tuple[int, list[TensorInfo], list[torch.Tensor] | None, int]]:
    """Neighbours in a file, their tensors (None if they cannot be had all at once), and the revocations until then."""
    from cached_client.torch import tensors_from_view

    for file_index, infos in arriving(arrivals, index, wanted, deadline, what):
        revocations, view = arrivals.revocations, _whole_view(arrivals, file_index, infos)
        yield file_index, infos, None if view is None else tensors_from_view(view, infos[0].begin, infos), revocations


def arriving(
    arrivals: Arrivals, index: TensorIndex, wanted: frozenset[str] | None, deadline: Deadline, what: str
) -> Iterator[tuple[int, list[TensorInfo]]]:
    """A file and tensors of it, in the order of their bytes, all of which may be read; until none is left."""
    pending: dict[int, PendingTensors] = {}

    def take() -> list[tuple[int, list[TensorInfo]]] | None:
        files = index.weight_files()
        for file_index in files or ():
            if file_index not in pending and (header := index.header(file_index)) is not None:
                listed = header.tensors.values()
                pending[file_index] = PendingTensors(
                    listed if wanted is None else [info for info in listed if info.name in wanted]
                )
        taken = [
            (file_index, infos)
            for file_index in files or ()
            for span in (arrivals.spans(file_index) if pending.get(file_index) else ())
            if (infos := pending[file_index].take([span]))
        ]
        # After the others, so that one whose neighbours are there comes in its place among them.
        taken += [(file_index, infos) for file_index, left in pending.items() if (infos := left.take_empty())]
        finished = files is not None and len(pending) == len(files) and not any(pending.values())
        return taken if taken or finished else None

    while batch := arrivals.wait_for(take, deadline, what):
        for file_index, infos in batch:
            for at in range(0, len(infos), _RUN):
                yield file_index, infos[at : at + _RUN]


def _whole_view(arrivals: Arrivals, file_index: int, infos: Sequence[TensorInfo]) -> memoryview | None:
    """The bytes of neighbours, or None if some of them are damaged, or have been taken back."""
    try:
        return arrivals.view(file_index, infos[0].begin, infos[-1].end)
    except IntegrityError:
        return None


def _wait_view(arrivals: Arrivals, file_index: int, info: TensorInfo, deadline: Deadline) -> memoryview:
    return arrivals.wait_for(lambda: arrivals.view(file_index, info.begin, info.end), deadline, info.name)
