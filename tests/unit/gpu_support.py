"""A device that copies as late as it may, and attached models without a daemon: what the tests of the ring share."""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Iterator

import numpy as np
import torch

from cached_client._arrivals import Arrivals, Deadline
from cached_client._index import TensorIndex
from cached_client.errors import DeviceError
from cached_client.gpu.device import PinningError
from cached_client.gpu.options import Geometry
from cached_client.gpu.ring import Ring
from cached_client.gpu.upload import Upload, Wanted
from cached_client.segment import MappedFile
from cached_client.types import FileInfo, LoadReport

REPORT = LoadReport("l3", 0, 0, 0, 0.0, "first-seen")
SMALL = Geometry(threads=2, slot_bytes=4096, steps=3)


class LatePinned:
    def __init__(self, device: LateDevice, array: np.ndarray) -> None:
        self.array = array
        self._device = device
        device.pinned.append(self)

    def release(self) -> None:
        if self in self._device.pinned:
            assert not self._device.in_flight(), "unpinned under a copy in flight"
            self._device.pinned.remove(self)
            if self.array.flags.writeable:
                self.array[:] = 0xEE


class LateEvent:
    def __init__(self, device: LateDevice, until: int) -> None:
        self._device = device
        self._until = until

    def wait(self) -> None:
        self._device.run(self._until)


class LateDevice:
    """Copies only when somebody waits for an event behind the copy, and reads the source only then.

    So a step that is filled again too early is copied with the wrong bytes, and found: at once by its checksum. Calls
    whose number is in ``failing`` raise.
    """

    name = "late:0"

    def __init__(self, *, can_pin: bool = True, can_register: bool = True, failing: dict[str, int] | None = None):
        self.can_pin = can_pin
        self.can_register = can_register
        self.failing = failing or {}
        self.pinned: list[LatePinned] = []
        self.copies: list[int] = []
        self.allocated: list[int] = []
        self.overwritten = 0
        self._lock = threading.RLock()
        self._queue: deque[tuple[np.ndarray, torch.Tensor, int]] = deque()
        self._enqueued = 0
        self._done = 0
        self._calls: dict[str, int] = {}

    def in_flight(self) -> int:
        return len(self._queue)

    def pin(self, size_bytes: int) -> tuple[LatePinned, str]:
        if not self.can_pin:
            raise PinningError("no pinned memory for late:0", device=self.name)
        self._count("pin")
        return LatePinned(self, np.full(size_bytes, 0xEE, np.uint8)), ""

    def register(self, memory: np.ndarray) -> LatePinned:
        if not self.can_register:
            raise PinningError("late:0 cannot register read-only memory", device=self.name)
        self._count("register")
        return LatePinned(self, memory)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self._count("allocate")
        self.allocated.append(size_bytes)
        return torch.full((size_bytes,), 0xAA, dtype=torch.uint8)

    def copy(self, source: LatePinned, begin: int, target: torch.Tensor) -> None:
        self._count("copy")
        assert source in self.pinned
        with self._lock:
            host = source.array[begin : begin + target.numel()]
            assert len(host) == target.numel()
            self._queue.append((host, target, zlib.crc32(host)))
            self._enqueued += 1
            self.copies.append(target.numel())

    def record(self) -> LateEvent:
        with self._lock:
            return LateEvent(self, self._enqueued)

    def drain(self) -> None:
        self._count("drain")
        self.run(self._enqueued)

    def run(self, until: int) -> None:
        self._count("run")
        with self._lock:
            while self._done < until:
                host, target, crc = self._queue.popleft()
                self.overwritten += zlib.crc32(host) != crc
                target.copy_(torch.tensor(host))
                self._done += 1

    def _count(self, call: str) -> None:
        with self._lock:
            number = self._calls[call] = self._calls.get(call, 0) + 1
        if number == self.failing.get(call):
            raise DeviceError(f"late:0 failed: {call}", device=self.name)


class Attached:
    """An attach without a daemon: the test says what arrives."""

    def __init__(self, files: dict[str, bytes], *, arrived: bool = False) -> None:
        self.files = files
        self.arrivals = Arrivals()
        infos = [FileInfo(path, len(content), "") for path, content in files.items()]
        self.arrivals.opened(infos, [_mapped(content) for content in files.values()])
        self.index = TensorIndex(self.arrivals)
        if arrived:
            self.arrive()

    def announce(self, index: int, begin: int, end: int) -> None:
        self.arrivals.announced([(index, begin, end - begin)])

    def arrive(self) -> None:
        self.arrivals.completed(REPORT)

    def upload(self, device, ring=None, wanted=None, *, timeout_s=30.0, registered=None) -> Upload:
        ring = ring or Ring(device, SMALL, None)
        return Upload(self.arrivals, self.index, device, ring, wanted or Wanted(), Deadline(timeout_s), registered)

    def load(self, device, ring=None, wanted=None, **options) -> dict[str, torch.Tensor]:
        return dict(self.upload(device, ring, wanted, **options).tensors())


def gpu_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cached-gpu")]


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, for any dtype, of the same shape."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return bytes_of(found) == bytes_of(expected)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _mapped(content: bytes) -> MappedFile:
    if not content:
        return MappedFile.empty()
    descriptor = os.memfd_create("weights")
    os.write(descriptor, content)
    return MappedFile(descriptor, len(content))


def pieces(size_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, int]]:
    for begin in range(0, size_bytes, chunk_bytes):
        yield begin, min(size_bytes, begin + chunk_bytes)
