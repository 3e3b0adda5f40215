"""What is asked of torch.cuda, which a stand-in answers here: that a GPU takes it is for ``make test-gpu`` to show."""

from __future__ import annotations

import contextlib
import mmap
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cached_client.errors import DeviceError
from cached_client.gpu import cuda
from cached_client.gpu.device import PinningError


class Runtime:
    """Registers host memory until ``room`` pieces are."""

    def __init__(self) -> None:
        self.registered: dict[int, tuple[int, int]] = {}
        self.room = 1000

    def cudaHostRegister(self, address: int, size_bytes: int, flags: int) -> int:
        if len(self.registered) == self.room:
            return 304
        assert address not in self.registered
        self.registered[address] = (size_bytes, flags)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 713


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waited_for: list[Stream] = []

    def wait_stream(self, other: Stream) -> None:
        self.waited_for.append(other)

    def synchronize(self) -> None:
        """Everything is done at once."""


class Event:
    def __init__(self, *, blocking: bool) -> None:
        assert blocking

    def record(self, stream: Stream) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    current = Stream(torch.device("cuda:1"))
    stand_in = SimpleNamespace(
        OutOfMemoryError=torch.cuda.OutOfMemoryError, Stream=Stream, Event=Event,
        is_available=lambda: True, device_count=lambda: 2, current_device=lambda: 1,
        current_stream=lambda _: current, cudart=lambda: runtime,
        stream=lambda _: contextlib.nullcontext(), device=lambda _: contextlib.nullcontext(),
    )  # fmt: skip
    monkeypatch.setattr(torch, "cuda", stand_in)
    empty, zeros = torch.empty, torch.zeros
    monkeypatch.setattr(torch, "empty", lambda size, dtype, **_: empty(size, dtype=dtype))
    monkeypatch.setattr(torch, "zeros", lambda size, device: zeros(size))
    monkeypatch.setattr(cuda, "_PIECE_BYTES", 1 << 16)
    yield runtime
    assert runtime.registered == {}


def test_memory_is_registered_in_pieces_and_copies_stay_within_them(runtime) -> None:
    device = cuda.CudaDevice(torch.device("cuda"))
    assert device.name == "cuda:1"
    pinned, without = device.pin(300_000)
    assert without == ""
    assert [size for size, _ in runtime.registered.values()] == [65536] * 4 + [300_000 - 4 * 65536]
    assert {flags for _, flags in runtime.registered.values()} == {1}
    assert all(address % 4096 == 0 for address in runtime.registered)
    pinned.array[:] = np.arange(300_000) % 251
    target = device.allocate(200_000)
    device.copy(pinned, 50_000, target)
    device.record().wait()
    device.drain()
    assert (target.numpy() == pinned.array[50_000:250_000]).all()
    pinned.release()
    pinned.release()


def test_copies_are_ordered_after_what_the_memory_was_used_for_before(runtime) -> None:
    device = cuda.CudaDevice(torch.device("cuda:0"))
    device.allocate(10)
    assert device._stream.waited_for == [device._consumer]


def test_a_refused_registration_gives_torchs_pinned_memory_and_leaves_no_piece(runtime) -> None:
    runtime.room = 2
    pinned, without = cuda.CudaDevice(torch.device("cuda:0")).pin(300_000)
    assert "refused to register" in without
    assert "304" in without
    assert len(pinned.array) == 300_000
    pinned.release()


def test_no_pinned_memory_at_all(runtime, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nand more")

    runtime.room = 0
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(PinningError, match="out of memory"):
        cuda.CudaDevice(torch.device("cuda:0")).pin(300_000)


def test_a_read_only_mapping_is_registered_where_the_device_says_that_it_can(runtime, monkeypatch) -> None:
    descriptor = os.memfd_create("segment")
    os.write(descriptor, b"abcd" * 75_000)
    mapping = np.frombuffer(mmap.mmap(descriptor, 300_000, mmap.MAP_SHARED, mmap.PROT_READ), np.uint8)
    os.close(descriptor)
    device = cuda.CudaDevice(torch.device("cuda:0"))
    monkeypatch.setattr(cuda, "_driver_attribute", lambda *_: 0)
    with pytest.raises(PinningError, match="cannot register read-only memory"):
        device.register(mapping)
    monkeypatch.setattr(cuda, "_driver_attribute", lambda *_: 1)
    pinned = device.register(mapping)
    assert {flags for _, flags in runtime.registered.values()} == {1 | 8}
    target = device.allocate(4)
    device.copy(pinned, 65534, target)
    assert bytes(target.numpy()) == b"cdab"
    pinned.release()


def test_errors_of_torch_are_typed(runtime, monkeypatch) -> None:
    def raising(error: Exception):
        def raise_it(*_: object, **__: object) -> None:
            raise error

        return raise_it

    device = cuda.CudaDevice(torch.device("cuda:0"))
    monkeypatch.setattr(torch, "empty", raising(torch.cuda.OutOfMemoryError("CUDA out of memory. Tried\nmore")))
    with pytest.raises(DeviceError, match="cuda:0 has no room: allocating 5 bytes failed: CUDA out of memory"):
        device.allocate(5)
    monkeypatch.setattr(device._stream, "synchronize", raising(RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(DeviceError, match="illegal memory access") as raised:
        device.drain()
    assert "restart this worker" in raised.value.hint
    with pytest.raises(DeviceError, match="there is no cuda:2: this process sees 2 GPUs"):
        cuda.CudaDevice(torch.device("cuda:2"))
