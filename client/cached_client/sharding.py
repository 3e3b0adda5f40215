"""A rank's slices for tensor parallelism, evenly divided."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from cached_client.errors import InvalidRequestError

if TYPE_CHECKING:
    from cached_client.gpu.image import Slice
    from cached_client.safetensors_header import TensorInfo

Dims = Mapping[str, int] | Callable[["TensorInfo"], int | None]
"""The dimension along which a tensor is divided, by a pattern of its name (the first that fits counts) or a function;
None, or no pattern: every rank has all of it."""


def shard(rank: int, world_size: int, dims: Dims) -> Callable[[TensorInfo], Slice | None]:
    """What rank ``rank`` of ``world_size`` has of each tensor, for the ``slices`` of `Model.stream` and its kind.

    ::

        dims = {"*.q_proj.weight": 0, "*.k_proj.weight": 0, "*.v_proj.weight": 0, "*.o_proj.weight": 1}
        model.state_dict("cuda:1", slices=cached_client.shard(1, 2, dims))

    Patterns are those of `fnmatch`, with case. Raises InvalidRequestError for a rank that does not exist, and, once
    the tensor is asked for, if it has no such dimension or cannot be divided evenly.
    """
    if not 0 <= rank < world_size:
        raise InvalidRequestError(
            f"there is no rank {rank} of {world_size}", hint=f"ranks are 0 to {world_size - 1}", value=rank
        )

    def slice_of_rank(info: TensorInfo) -> Slice | None:
        dim = _dim(info, dims)
        return None if dim is None else _even(info, dim, rank, world_size)

    return slice_of_rank


def _dim(info: TensorInfo, dims: Dims) -> int | None:
    if isinstance(dims, Mapping):
        return next((dim for pattern, dim in dims.items() if fnmatchcase(info.name, pattern)), None)
    return dims(info)


def _even(info: TensorInfo, dim: int, rank: int, world_size: int) -> Slice:
    from cached_client.torch import torch_shape

    shape = torch_shape(info)
    try:
        extent = shape[dim]
    except (IndexError, TypeError):  # TypeError: it is no integer
        raise InvalidRequestError(
            f"{info.name!r} of shape {list(shape)} has no dimension {dim!r}",
            hint="look at the dimensions given to shard",
            value=dim,
            tensor=info.name,
        ) from None
    if extent % world_size:
        raise InvalidRequestError(
            f"{info.name!r} of shape {list(shape)} cannot be divided evenly along dimension {dim} among {world_size}",
            hint="use another number of ranks, leave it whole (None), or give slices of your own",
            value=world_size,
            tensor=info.name,
        )
    share = extent // world_size
    return dim, rank * share, (rank + 1) * share
