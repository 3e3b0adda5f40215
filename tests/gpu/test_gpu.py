"""The ring on a real GPU, beside the CPU's tensors: ``make test-gpu``. Skipped, with a word, where there is none."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client import gpu
from cached_client.errors import DeviceError
from cached_client.gpu import GpuOptions
from cached_client.gpu.cuda import CudaDevice
from cached_client.gpu.device import PinningError
from cached_client.gpu.options import MIB
from cached_client.testing import FakeDaemon
from tests.unit.gpu_support import bytes_of, gpu_threads, pieces

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use: nothing was tested"),
]

DEVICE = "cuda:0"
SMALL = GpuOptions(threads=2, slot_bytes=256 * 1024)
REPEATED = dataclasses.replace(SMALL, register_after=1)


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


@pytest.fixture(autouse=True)
def nothing_is_left():
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    gpu.release()
    torch.cuda.synchronize()  # also raises an error that was left behind
    torch.zeros(8, device=DEVICE).add_(1).cpu()
    assert gpu_threads() == []
    assert torch.cuda.memory_allocated() <= before


def checkpoint(seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{n}.weight": torch.randn(1024, 1031, generator=generator) for n in range(8)}
    tensors["bf16"] = torch.randn(513, 77, generator=generator).to(torch.bfloat16)
    tensors["fp8"] = torch.randn(300, 31, generator=generator).to(torch.float8_e4m3fn)
    tensors["bool"] = torch.randint(0, 2, (7, 5), generator=generator).to(torch.bool)
    tensors["int64"] = torch.arange(1001)
    tensors["scalar"] = torch.tensor(3.5)
    tensors["empty"] = torch.empty(0, 4)
    return tensors | {f"small.{n}": torch.full((n % 97 + 1,), n, dtype=torch.int32) for n in range(3000)}


def shards(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    return {path: save({name: tensors[name] for name in part}) for path, part in parts.items()}


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in found.items():
        assert tensor.device == torch.device(DEVICE)
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        assert bytes_of(tensor.cpu()) == bytes_of(expected[name]), name


@pytest.fixture
def model(daemon, cache):
    daemon.add("m", shards(checkpoint()))
    with cache.attach("m", wait=True) as attached:
        yield attached


@pytest.mark.parametrize("options", [None, SMALL, GpuOptions(threads=1, slot_bytes=4096, steps=2)])
def test_the_state_dict_is_that_of_the_cpu(model, options) -> None:
    for _ in range(3):
        check(model.state_dict(DEVICE, gpu=options), checkpoint())
    report = model.device_report
    assert report.path == "ring", report
    assert report.fallbacks == (), "pinning did not go as it should"


def test_the_stream(model) -> None:
    check(dict(model.stream(DEVICE, gpu=SMALL)), checkpoint())
    bounded = dataclasses.replace(SMALL, buffer_bytes=5 * MIB, ahead_bytes=12 * MIB)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _, tensor in model.stream(DEVICE, gpu=bounded):
        del tensor
    assert torch.cuda.max_memory_allocated() - before < 30 * MIB  # the model has 34


def test_tensors_can_be_used_at_once_on_any_stream(model) -> None:
    expected, sums = checkpoint(), {}
    other = torch.cuda.Stream()
    for name, tensor in model.stream(DEVICE, gpu=SMALL):
        if tensor.is_floating_point() and tensor.element_size() == 4:
            with torch.cuda.stream(other):
                sums[name] = tensor.double().sum()
                tensor.record_stream(other)
    other.synchronize()
    for name, total in sums.items():
        assert total.item() == pytest.approx(expected[name].double().sum().item(), rel=1e-9, abs=1e-9)


def test_slices(model) -> None:
    expected = checkpoint()
    slices = {f"layer.{n}.weight": (n % 2, 128 * n, 128 * n + 100) for n in range(8)}
    for name, (dim, start, stop) in slices.items():
        expected[name] = expected[name].narrow(dim, start, stop - start)
    check(model.state_dict(DEVICE, slices=slices, gpu=SMALL), expected)


def test_what_arrives_in_random_order(daemon, cache) -> None:
    expected = checkpoint()
    files = shards(expected)
    daemon.add("cold", files, arrived=False)
    chunks = [(path, *piece) for path, content in files.items() for piece in pieces(len(content), 700_000)]
    random.Random(3).shuffle(chunks)

    def arrive() -> None:
        for path, begin, end in chunks:
            daemon.announce("cold", path, begin, end)
        daemon.complete("cold")

    with cache.attach("cold") as model:
        source = threading.Thread(target=arrive)
        source.start()
        found = model.state_dict(DEVICE, gpu=SMALL)
        source.join()
        check(found, expected)


def test_unaligned_tensors(daemon, cache) -> None:
    header, data = {}, b""
    for name, dtype, content in (("odd", "U8", b"\1\2\3"), ("f64", "F64", bytes(range(16))), ("bf16", "BF16", b"abcd")):
        size = len(content) // {"U8": 1, "F64": 8, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": [size], "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    daemon.add("odd", {"m.safetensors": len(text).to_bytes(8, "little") + text + data})
    with cache.attach("odd", wait=True) as model:
        check(model.state_dict(DEVICE, gpu=SMALL), {name: model.tensor(name) for name in model.names()})


def test_a_module_on_the_meta_device(daemon, cache) -> None:
    weights = torch.nn.Linear(64, 32).state_dict()
    daemon.add("linear", {"m.safetensors": save(weights)})
    with cache.attach("linear", wait=True) as model, torch.device("meta"):
        module = torch.nn.Linear(64, 32)
        model.load_into(module, DEVICE)
    check({name: tensor.detach() for name, tensor in module.state_dict().items()}, weights)


def test_leaving_early_leaves_nothing(model) -> None:
    for _ in range(5):
        stream = model.stream(DEVICE, gpu=SMALL)
        next(stream)
        stream.close()
        assert gpu_threads() == []
    check(model.state_dict(DEVICE, gpu=SMALL), checkpoint())


def test_a_mapping_is_registered_where_the_device_can(model) -> None:
    for _ in range(3):
        check(model.state_dict(DEVICE, gpu=REPEATED), checkpoint())
    report = model.device_report
    assert report.path == "registered" or report.fallbacks, report


def test_a_refused_registration_leaves_no_error_behind() -> None:
    device: Any = CudaDevice(torch.device(DEVICE))
    pinned, without = device.pin(MIB)
    assert without == ""
    with pytest.raises(PinningError):
        device._register(pinned.array, 1)  # it is registered already
    torch.ones(4, device=DEVICE).add_(1).cpu()
    pinned.release()
    pinned.release()
    again = device._register(pinned.array, 1)  # so it was given back
    assert len(again) == 1
    pinned._pieces = again
    pinned.release()


def test_a_device_without_room_says_so(model) -> None:
    free_bytes = torch.cuda.mem_get_info()[0]
    device = CudaDevice(torch.device(DEVICE))
    with pytest.raises(DeviceError, match="has no room"):
        device.allocate(2 * free_bytes)
    check(model.state_dict(DEVICE, gpu=SMALL), checkpoint())


def test_a_device_that_is_not_there(model) -> None:
    with pytest.raises(DeviceError, match="GPUs"):
        model.state_dict(f"cuda:{torch.cuda.device_count()}")


def test_where_the_gpu_sits() -> None:
    address = CudaDevice(torch.device(DEVICE)).pci_address
    assert address is None or len(address) == len("0000:3b:00.0")
