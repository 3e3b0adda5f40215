"""Pins the mappings themselves, so that a device reads the weights where they are: no ring, no memcpy.

Pinning costs 0.04 to 0.1 s for each GB, which a load that happens once never gets back; and many platforms refuse it
for read-only memory. So it is off unless `GpuOptions.register_after` asks for it, and whatever stands in its way only
means that the ring is used.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING

from cached_client.gpu.device import PinningError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cached_client.gpu.device import Device, Pinned


class RegisteredFiles:
    """The pinned mappings of a model's files, for one device. For one thread at a time."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._mappings: list[mmap.mmap] = []
        self.files: dict[int, Pinned] = {}

    def register(
        self,
        sizes_bytes: Mapping[int, int],
        fetch: Callable[[Sequence[int]], Iterable[tuple[int, int]]],
    ) -> None:
        """Pins files whose descriptors ``fetch`` gives. All or nothing: raises PinningError, and as ``fetch``."""
        indices = [index for index, size_bytes in sizes_bytes.items() if size_bytes]
        try:
            for index, descriptor in fetch(indices):
                try:
                    self._register(index, descriptor, sizes_bytes[index])
                finally:
                    os.close(descriptor)
        except BaseException:
            self.release()
            raise

    def _register(self, index: int, descriptor: int, size_bytes: int) -> None:
        import numpy as np

        try:
            # Several processes that register one segment at the same time fail; the segment itself is their lock.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Not the private mapping that the tensors use: pinning that would copy every page.
            mapping = mmap.mmap(descriptor, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        except OSError as error:
            raise PinningError(f"a segment cannot be mapped for the device: {error}", cause=error) from error
        self._mappings.append(mapping)
        try:
            self.files[index] = self._device.register(np.frombuffer(mapping, np.uint8))
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)

    def release(self) -> None:
        """Unpins. Idempotent. No copy may be in flight."""
        files, self.files = self.files, {}
        for pinned in files.values():
            pinned.release()
        self._mappings.clear()
