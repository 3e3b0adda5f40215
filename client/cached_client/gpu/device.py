"""What the ring needs of a device. `cuda` does it for NVIDIA's; the tests have one that copies late, to find races."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from cached_client.errors import CacheError, DeviceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch


class PinningError(DeviceError):
    """Host memory could not be pinned: another path is taken, and the report says so."""


class Event(Protocol):
    """A point in the device's one stream of copies."""

    def wait(self) -> None:
        """Returns when everything that was enqueued before it is done. Raises DeviceError. Releases the GIL."""
        ...


class Pinned(Protocol):
    """Host memory that the device reads by itself."""

    @property
    def array(self) -> npt.NDArray[np.uint8]:
        """All of it."""
        ...

    def release(self) -> None:
        """Unpins it. Idempotent. No copy may be in flight. Does not raise: what fails is logged."""
        ...


class Device(Protocol):
    """One device, and one stream on it, for one load. Any thread may call it."""

    @property
    def name(self) -> str:
        """E.g. ``cuda:0``."""
        ...

    def pin(self, size_bytes: int) -> tuple[Pinned, str]:
        """Fresh pinned memory; the second value says what was done without, if anything. Raises PinningError."""
        ...

    def register(self, memory: npt.NDArray[np.uint8]) -> Pinned:
        """Pins memory that is there, for reading. The caller keeps it mapped. Raises PinningError."""
        ...

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """A flat buffer of bytes on the device, for copies from now on. Raises DeviceError."""
        ...

    def copy(self, source: Pinned, begin: int, target: torch.Tensor) -> None:
        """Enqueues a copy of ``target.numel()`` bytes from ``begin`` in ``source``. Raises DeviceError."""
        ...

    def record(self) -> Event:
        """The point after what this thread enqueued. Raises DeviceError."""
        ...

    def drain(self) -> None:
        """Returns when no copy is in flight. Raises DeviceError."""
        ...


def as_cache_error(error: BaseException, device: str) -> CacheError:
    """What ended a load, as the caller gets it; an error that is no CacheError becomes a `DeviceError`."""
    if isinstance(error, CacheError):
        return error.with_traceback(None)  # its frames would keep mappings and device memory alive
    failure = DeviceError(
        f"the copy to {device} failed: {error!r}",
        hint="this is a fault of the copy loop: please report it; tensors on the CPU are not affected",
        device=device,
        cause=repr(error),
    )
    failure.__cause__ = error.with_traceback(None)
    return failure
