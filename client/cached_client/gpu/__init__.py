"""Tensors from mapped host memory to a GPU, at the speed of the link.

A plain ``tensor.to("cuda")`` from pageable memory is staged by the driver through one thread, and one copy for each
tensor costs more than the bytes do. Here a few threads copy what has arrived into a **ring** of pinned memory that is
small enough to stay in the processor's cache; one stream copies from there, in large steps, into flat buffers on the
device; tensors are views of these.

==================  ==================================================================================================
`options`           what can be tuned, and what is reported
`image`             where each tensor goes in the flat buffers, and which bytes of its file fill it (pure)
`device`            what the ring needs of a device: a narrow interface
`cuda`              that interface on CUDA, by torch
`ring`              the pinned memory, the threads that fill it, the one that waits for the copies
`upload`            one load: joins the above to what arrives
`registered`        pins the mapping itself instead, where that works and pays (off unless asked for)
`topology`          the GPU's NUMA node, processors and PCIe generation
==================  ==================================================================================================

Importing it is cheap: torch and numpy are loaded with the first copy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cached_client.errors import DeviceError
from cached_client.gpu.image import Slice, Slices
from cached_client.gpu.options import DeviceReport, GpuOptions

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceReport", "GpuOptions", "Slice", "Slices", "release", "to_device"]


def to_device(tensor: torch.Tensor, device: str | torch.device | None) -> torch.Tensor:
    """The tensor on ``device``; itself, without a copy, for None and for the CPU.

    The plain way, for devices that have no ring and where the ring cannot be had. The copy is done when this returns.
    Raises DeviceError for a device that cannot be used or has no room.
    """
    if device is None:
        return tensor
    try:
        return tensor.to(device)
    except Exception as error:  # what torch raises for a device that it lacks is of any kind, also an AssertionError
        import torch

        cause = (str(error).splitlines() or [repr(error)])[0]
        raise DeviceError(
            f"{device} cannot be used: a copy of {tensor.nbytes} bytes to it failed: {cause}",
            hint=f"is it there, is torch {torch.__version__} a build for it, and has it room?",
            device=device,
            cause=cause,
        ) from error


def release() -> None:
    """Gives the pinned rings of this process back, except those in use; the next load makes a new one.

    A ring is kept from load to load, because pinning takes time; it is given back when the process ends. Any thread.
    """
    from cached_client.gpu.ring import RINGS

    RINGS.release()
