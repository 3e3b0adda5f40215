"""Tensors from mapped host memory to a device.

This is the plain way: one ``tensor.to(device)`` for each tensor, from pageable memory, so the driver stages every copy
and the link is not filled. The ring of pinned buffers that fills it is not written yet; it will stand behind this same
function.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: str | torch.device | None) -> torch.Tensor:
    """The tensor on ``device``; itself, without a copy, for None and for the CPU.

    The copy is done when this returns. Raises torch's RuntimeError for a device that cannot be used or has no room.
    """
    return tensor if device is None else tensor.to(device)
