"""Tensors from mapped bytes. torch is imported when the first one is asked for."""

from __future__ import annotations

from functools import cache, partial
from itertools import repeat
from typing import TYPE_CHECKING, Any

from cached_client.dtypes import DTYPES
from cached_client.errors import UnsupportedDtypeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import torch

    from cached_client.safetensors_header import TensorInfo


def tensor_from_view(view: memoryview, info: TensorInfo) -> torch.Tensor:
    """The tensor whose bytes are ``view``: zero-copy, of the dtype and shape that ``safetensors.torch`` gives it.

    The tensor keeps the mapping alive. A write to it stays private to this process. Two cases have memory of their own:
    a tensor without elements, and one that a careless writer put at an offset that is no multiple of its item size, for
    which torch makes no promise; that one is copied.

    A packed F4 tensor has half its last extent, as ``torch.float4_e2m1fn_x2`` holds two elements. Raises
    UnsupportedDtypeError for what this torch, and ``safetensors.torch``, have no type for: F6, an odd last extent of
    F4.
    """
    import torch

    dtype = torch_dtype(info)
    shape = torch_shape(info)
    if not view:
        return torch.empty(shape, dtype=dtype, device="cpu")  # whatever device is the default in this block
    aligned = info.begin % DTYPES[info.dtype].item_bytes == 0
    return torch.frombuffer(view if aligned else bytearray(view), dtype=dtype).reshape(shape)


def tensors_from_view(view: memoryview, begin: int, infos: Sequence[TensorInfo]) -> list[torch.Tensor]:
    """The tensors that lie in ``view``, which begins at ``begin`` in their file: as `tensor_from_view` gives each.

    Each has a storage of its own, so that one can be saved, or freed, without the others. Neighbours that are alike, as
    a layer's experts are, are made together.
    """
    tensors: list[torch.Tensor] = []
    at = 0
    while at < len(infos):
        _, dtype, shape, first, end = infos[at]
        until = at + 1
        while until < len(infos) and infos[until][1:4] == (dtype, shape, end):
            end = infos[until].end
            until += 1
        tensors += _alike(view[first - begin : end - begin], infos[at], until - at)
        at = until
    return tensors


def _alike(view: memoryview, info: TensorInfo, count: int) -> Iterable[torch.Tensor]:
    """``count`` tensors like ``info``, which follow one another in ``view``."""
    import torch

    dtype, shape, item_bytes = torch_dtype(info), torch_shape(info), DTYPES[info.dtype].item_bytes
    carrier = _carrier(item_bytes)
    if carrier is None or not view or not shape or info.begin % item_bytes:
        size_bytes = info.size_bytes
        return [tensor_from_view(view[at * size_bytes : (at + 1) * size_bytes], info) for at in range(count)]
    # numpy divides and shapes memory several times faster than torch, and need not know what the items mean.
    from_numpy, array = carrier
    return map(torch.Tensor.view, map(from_numpy, array(view).reshape(count, *shape)), repeat(dtype))


@cache
def _carrier(item_bytes: int) -> tuple[Callable[[Any], torch.Tensor], Callable[[memoryview], Any]] | None:
    """From an array to a tensor, and from memory to an array of integers as wide as the items.

    None where there is no numpy, or none that this torch was made for.
    """
    import torch

    try:
        import numpy as np

        integers = np.dtype(f"i{item_bytes}")
        torch.from_numpy(np.zeros(1, integers))
    except (ImportError, RuntimeError):
        return None
    return torch.from_numpy, partial(np.frombuffer, dtype=integers)


def torch_dtype(info: TensorInfo) -> torch.dtype:
    """Torch's type for a tensor. Raises UnsupportedDtypeError where it has none."""
    import torch

    dtype = getattr(torch, DTYPES[info.dtype].torch_name or "-", None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedDtypeError(
            f"torch {torch.__version__} has no type for {info.dtype}, the dtype of {info.name!r}",
            hint="raw() gives its bytes as they are in the file",
            tensor=info.name,
            dtype=info.dtype,
        )
    return dtype


def torch_shape(info: TensorInfo) -> tuple[int, ...]:
    """The shape in torch, which packs F4. Raises UnsupportedDtypeError where it cannot."""
    packed = DTYPES[info.dtype].packed
    if packed == 1:
        return info.shape
    if not info.shape or info.shape[-1] % packed:
        raise UnsupportedDtypeError(
            f"torch packs {packed} elements of {info.dtype}, so {info.name!r} cannot have the shape {list(info.shape)}",
            hint="raw() gives its bytes as they are in the file",
            tensor=info.name,
            dtype=info.dtype,
        )
    return (*info.shape[:-1], info.shape[-1] // packed)
