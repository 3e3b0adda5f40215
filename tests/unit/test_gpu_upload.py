"""A load through the ring: every order of arrival, every dtype, errors in the middle, and nothing left behind."""

from __future__ import annotations

import gc
import json
import random
import threading
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from cached_client.errors import CacheError, DeviceError, InvalidRequestError, TimeoutExpiredError
from cached_client.gpu.options import Geometry
from cached_client.gpu.ring import Ring, Window
from cached_client.gpu.upload import Wanted
from tests.unit.client_support import eventually
from tests.unit.gpu_support import SMALL, Attached, LateDevice, gpu_threads, pieces, same

BIG = Geometry(threads=3, slot_bytes=65536, steps=2)


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert gpu_threads() == []


def many(count: int, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9000, (count,), generator=generator).tolist()
    return {
        f"w{index}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
        for index, size in enumerate(sizes)
    }


def check(device: LateDevice, found, expected) -> None:
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if not same(found[name], expected[name])] == []
    assert device.overwritten == 0
    assert device.in_flight() == 0


def test_every_byte_arrives_and_no_step_is_filled_before_its_event() -> None:
    tensors, device = many(200), LateDevice()
    check(device, Attached({"m.safetensors": save(tensors)}, arrived=True).load(device), tensors)
    assert len(device.copies) > 3 * SMALL.steps  # each step was used again and again
    assert max(device.copies) <= SMALL.step_bytes


def test_the_late_device_finds_a_step_that_is_filled_too_early() -> None:
    device = LateDevice()
    pinned, _ = device.pin(8)
    target = device.allocate(8)
    device.copy(pinned, 0, target)
    pinned.array[:] = 1
    device.record().wait()
    assert device.overwritten == 1


def test_one_file_is_one_buffer_and_few_copies() -> None:
    tensors = {f"w{index}": torch.full((64,), index, dtype=torch.float32) for index in range(3000)}
    device = LateDevice()
    ring = Ring(device, Geometry(threads=2, slot_bytes=128 * 1024, steps=3), None)
    check(device, Attached({"m.safetensors": save(tensors)}, arrived=True).load(device, ring), tensors)
    assert device.allocated == [3000 * 256]
    assert sorted(device.copies) == [3000 * 256 - 512 * 1024, 256 * 1024, 256 * 1024]


def test_ten_thousand_tensors_of_any_size() -> None:
    tensors = {f"w{index}": torch.full((index % 7,), index % 251, dtype=torch.uint8) for index in range(10_000)}
    device = LateDevice()
    check(
        device, Attached({"m.safetensors": save(tensors)}, arrived=True).load(device, Ring(device, BIG, None)), tensors
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32), st.sampled_from([1000, 5000, 40_000]), st.booleans())
def test_arrival_in_random_order(seed: int, chunk_bytes: int, bounded: bool) -> None:
    order = random.Random(seed)
    tensors = many(30, seed)
    names = list(tensors)
    files = {
        "a.safetensors": save({name: tensors[name] for name in names[:11]}),
        "b.safetensors": save({name: tensors[name] for name in names[11:]}),
    }
    attached, device = Attached(files), LateDevice()
    chunks = [
        (index, begin, end)
        for index, content in enumerate(files.values())
        for begin, end in pieces(len(content), chunk_bytes)
    ]
    order.shuffle(chunks)
    wanted = Wanted(buffer_bytes=20_000, ahead_bytes=30_000) if bounded else Wanted()

    def arrive() -> None:
        for index, begin, end in chunks:
            attached.announce(index, begin, end)
        attached.arrive()

    source = threading.Thread(target=arrive)
    source.start()
    check(device, attached.load(device, wanted=wanted), tensors)
    source.join()


def test_a_tensor_is_handed_out_before_the_rest_has_arrived() -> None:
    tensors = {"first": torch.arange(5000.0), "second": torch.arange(7000.0)}
    content = save(tensors)
    attached, device = Attached({"m.safetensors": content}), LateDevice()
    attached.announce(0, 0, len(content) - 4)
    stream = attached.upload(device).tensors()
    name, tensor = next(stream)
    assert same(tensor, tensors[name])
    attached.announce(0, len(content) - 4, len(content))
    rest = dict(stream)
    check(device, {name: tensor, **rest}, tensors)


def raw_file(parts: list[tuple[str, str, list[int], bytes]]) -> bytes:
    """A file with its tensors in this order, at whatever place that gives them: as careless writers do."""
    header, data = {}, b""
    for name, dtype, shape, content in parts:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_every_dtype_also_unaligned_scalar_and_empty() -> None:
    dtypes = {
        "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "BF16": torch.bfloat16, "F16": torch.float16,
        "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
        "I64": torch.int64, "U64": torch.uint64, "F64": torch.float64, "C64": torch.complex64,
        "F4": torch.float4_e2m1fn_x2,
    }  # fmt: skip
    parts: list[tuple[str, str, list[int], bytes]] = [("odd", "U8", [3], b"\1\0\1")]
    expected = {"odd": torch.tensor([1, 0, 1], dtype=torch.uint8)}
    for name, dtype in dtypes.items():
        content = bytes(range(24 * dtype.itemsize)) if name != "BOOL" else bytes([0, 1] * 12)
        shape = [3, 16] if name == "F4" else [3, 8]
        parts.append((name, name, shape, content))
        flat = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        expected[name] = flat.view(dtype).reshape(3, 8)
        parts.append((f"{name}.empty", name, [0, 4], b""))
        expected[f"{name}.empty"] = torch.empty((0, 2 if name == "F4" else 4), dtype=dtype)
    parts.append(("scalar", "F32", [], b"\0\0\x80\x3f"))
    expected["scalar"] = torch.tensor(1.0)
    device = LateDevice()
    found = Attached({"m.safetensors": raw_file(parts)}, arrived=True).load(device)
    check(device, found, expected)
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in found.values())


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_slices_are_those_of_torch_and_only_their_bytes_cross(data) -> None:
    tensors, slices, expected = {}, {}, {}
    for index in range(data.draw(st.integers(1, 5))):
        shape = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
        tensor = torch.arange(int(torch.tensor(shape).prod())).to(torch.float32).reshape(shape)
        dim = data.draw(st.integers(0, len(shape) - 1))
        start = data.draw(st.integers(0, shape[dim]))
        stop = data.draw(st.integers(start, shape[dim]))
        tensors[f"w{index}"], slices[f"w{index}"] = tensor, (dim, start, stop)
        expected[f"w{index}"] = tensor.narrow(dim, start, stop - start)
    device = LateDevice()
    by_function = data.draw(st.booleans())
    wanted = Wanted(slices=(lambda info: slices[info.name]) if by_function else slices)
    found = Attached({"m.safetensors": save(tensors)}, arrived=True).load(device, wanted=wanted)
    check(device, found, expected)
    assert sum(device.copies) <= sum(tensor.nbytes + 256 for tensor in expected.values())


def test_chosen_names_alone_cross() -> None:
    tensors, device = many(20), LateDevice()
    found = Attached({"m.safetensors": save(tensors)}, arrived=True).load(
        device, wanted=Wanted(frozenset({"w3", "w7"}))
    )
    check(device, found, {name: tensors[name] for name in ("w3", "w7")})
    assert sum(device.copies) <= sum(found[name].nbytes + 256 for name in found)


def test_a_model_without_tensors() -> None:
    device = LateDevice()
    assert Attached({"config.json": b"{}"}, arrived=True).load(device) == {}
    assert Attached({"m.safetensors": save({})}, arrived=True).load(device) == {}


def test_at_most_so_much_lies_untaken_on_the_device() -> None:
    tensors = {f"w{index}": torch.full((10_000,), index, dtype=torch.uint8) for index in range(50)}
    attached, device = Attached({"m.safetensors": save(tensors)}, arrived=True), LateDevice()
    stream = attached.upload(device, wanted=Wanted(buffer_bytes=25_000, ahead_bytes=60_000)).tensors()
    found = {}
    for taken, (name, tensor) in enumerate(stream, 1):
        assert sum(device.allocated) <= 60_000 + 256 * 50 + taken * 10_000
        found[name] = tensor.clone()
    check(device, found, tensors)


def test_a_buffer_that_was_begun_is_finished_though_an_earlier_one_has_no_room() -> None:
    tensors = {f"w{index}": torch.full((50_000,), index, dtype=torch.uint8) for index in range(4)}
    content = save(tensors)
    header_bytes = len(content) - 4 * 50_000
    attached, device = Attached({"m.safetensors": content}), LateDevice()
    stream = attached.upload(device, wanted=Wanted(buffer_bytes=1, ahead_bytes=1), timeout_s=20).tensors()
    attached.announce(0, 0, header_bytes)
    attached.announce(0, header_bytes + 110_000, header_bytes + 120_000)  # of the third
    consumer = threading.Thread(target=lambda: found.update(stream))
    found: dict[str, torch.Tensor] = {}
    consumer.start()
    eventually(lambda: device.allocated, "the buffer of the third tensor")
    attached.announce(0, 0, len(content))
    attached.arrive()
    consumer.join()
    assert next(iter(found)) == "w2"
    check(device, found, tensors)


def test_a_buffer_is_freed_with_the_last_of_its_tensors() -> None:
    tensors = {f"w{index}": torch.full((10_000,), index, dtype=torch.uint8) for index in range(9)}
    attached, device = Attached({"m.safetensors": save(tensors)}, arrived=True), LateDevice()
    storages = []
    stream = attached.upload(device, wanted=Wanted(buffer_bytes=1, ahead_bytes=20_000)).tensors()
    for _, tensor in stream:
        storages.append(weakref.ref(tensor.untyped_storage()))
        del tensor
        gc.collect()
        assert sum(storage() is not None for storage in storages[:-1]) == 0
    assert len(storages) == 9


@pytest.mark.parametrize("failing", [{"copy": 1}, {"copy": 7}, {"run": 1}, {"run": 5}, {"allocate": 1}])
def test_a_device_that_fails_in_the_middle_ends_the_load_with_its_error(failing) -> None:
    device = LateDevice(failing=failing)
    ring = Ring(device, SMALL, None)
    upload = Attached({"m.safetensors": save(many(100))}, arrived=True).upload(device, ring)
    with pytest.raises(DeviceError, match=f"late:0 failed: {next(iter(failing))}"):
        list(upload.tensors())
    assert gpu_threads() == []
    assert upload.usable
    ring.release()
    assert device.pinned == []


def test_a_device_that_cannot_even_drain_makes_the_ring_unusable() -> None:
    device = LateDevice(failing={"copy": 3, "drain": 1})
    upload = Attached({"m.safetensors": save(many(100))}, arrived=True).upload(device)
    with pytest.raises(DeviceError, match="late:0 failed: copy"):
        list(upload.tensors())
    assert not upload.usable


def test_a_fault_of_our_own_is_told_as_a_device_error(monkeypatch) -> None:
    device = LateDevice()
    monkeypatch.setattr("cached_client.gpu.image.Image.gather", lambda *_: 1 / 0)
    with pytest.raises(DeviceError, match="ZeroDivisionError") as raised:
        Attached({"m.safetensors": save(many(10))}, arrived=True).load(device)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)


def test_an_attach_that_fails_ends_the_load_with_its_error() -> None:
    content = save(many(10))
    attached, device = Attached({"m.safetensors": content}), LateDevice()
    attached.announce(0, 0, len(content) // 2)
    stream = attached.upload(device).tensors()
    next(stream)
    attached.arrivals.failed(CacheError("the origin is gone"))
    with pytest.raises(CacheError, match="the origin is gone"):
        list(stream)


def test_bytes_that_do_not_arrive_in_time() -> None:
    content = save(many(10))
    attached, device = Attached({"m.safetensors": content}), LateDevice()
    attached.announce(0, 0, len(content) // 2)
    with pytest.raises(TimeoutExpiredError):
        attached.load(device, timeout_s=0.05)


def test_damaged_bytes_are_not_copied() -> None:
    content = save(many(10))
    attached, device = Attached({"m.safetensors": content}, arrived=True), LateDevice()
    attached.arrivals.damaged(0, len(content) - 100, 50)
    with pytest.raises(CacheError, match="damaged in memory"):
        attached.load(device)


def test_bytes_found_damaged_while_they_cross_are_not_handed_out(monkeypatch) -> None:
    content = save({"only": torch.arange(1000.0)})
    attached, device = Attached({"m.safetensors": content}, arrived=True), LateDevice()
    copy = device.copy

    def damage_and_copy(*arguments) -> None:
        attached.arrivals.damaged(0, len(content) - 100, 50)
        copy(*arguments)

    monkeypatch.setattr(device, "copy", damage_and_copy)
    with pytest.raises(CacheError, match="damaged in memory"):
        attached.load(device)


def test_a_bad_slice_is_refused_before_anything_is_copied() -> None:
    device = LateDevice()
    with pytest.raises(InvalidRequestError, match="does not fit"):
        Attached({"m.safetensors": save(many(3))}, arrived=True).load(device, wanted=Wanted(slices={"w1": (1, 0, 1)}))
    assert device.copies == []


def test_a_slice_that_is_none_is_refused() -> None:
    attached = Attached({"m.safetensors": save(many(3))}, arrived=True)
    no_slice: Any = (0, 1)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        attached.load(LateDevice(), wanted=Wanted(slices={"w1": no_slice}))


def test_what_the_callers_function_raises_comes_as_it_is_and_keeps_no_mapping_alive() -> None:
    def mistaken(info):
        raise KeyError(info.name)

    attached, device = Attached({"m.safetensors": save(many(3))}, arrived=True), LateDevice()
    mapping = weakref.ref(attached.arrivals.mapped()[0].view.obj)
    with pytest.raises(KeyError, match="w0") as raised:
        attached.load(device, wanted=Wanted(slices=mistaken))
    assert device.copies == []
    assert raised.traceback[-1].name == "mistaken"
    attached.arrivals.close()
    del attached
    gc.collect()
    assert mapping() is None


@pytest.mark.parametrize("arrived", [True, False])
def test_leaving_the_iteration_stops_the_load(arrived: bool) -> None:
    content = save(many(200))
    attached, device = Attached({"m.safetensors": content}, arrived=arrived), LateDevice()
    attached.announce(0, 0, len(content) // 2)
    ring = Ring(device, SMALL, None)
    stream = attached.upload(device, ring).tensors()
    next(stream)
    assert gpu_threads()
    stream.close()
    assert gpu_threads() == []
    ring.release()  # asserts that no copy is in flight
    assert device.pinned == []


def test_a_stream_that_is_dropped_stops_by_itself() -> None:
    attached, device = Attached({"m.safetensors": save(many(200))}, arrived=True), LateDevice()
    stream = attached.upload(device).tensors()
    next(stream)
    del stream
    gc.collect()
    assert gpu_threads() == []


def test_a_load_that_fails_keeps_no_mapping_alive() -> None:
    content = save(many(50))
    attached, device = Attached({"m.safetensors": content}, arrived=True), LateDevice(failing={"copy": 4})
    mapping = weakref.ref(attached.arrivals.mapped()[0].view.obj)
    with pytest.raises(DeviceError):
        attached.load(device)
    attached.arrivals.close()
    del attached
    gc.collect()
    assert mapping() is None


def test_a_daemon_that_restarts_in_the_middle_changes_nothing() -> None:
    tensors = many(60)
    content = save(tensors)
    attached, device = Attached({"m.safetensors": content}), LateDevice()
    attached.announce(0, 0, len(content) // 2)
    stream = attached.upload(device).tensors()
    found = dict([next(stream)])
    attached.arrivals.opened(attached.arrivals.infos(), attached.arrivals.mapped())  # all is announced anew
    for begin, end in pieces(len(content), 20_000):
        attached.announce(0, begin, end)
    found |= dict(stream)
    check(device, found, tensors)


def test_registered_files_are_copied_from_where_they_lie(monkeypatch) -> None:
    monkeypatch.setattr("cached_client.gpu.upload._DIRECT_BYTES", 4096)
    tensors = {"big": torch.arange(100_000.0), **many(40), "wide": torch.arange(60_000.0).reshape(200, 300)}
    attached, device = Attached({"m.safetensors": save(tensors)}, arrived=True), LateDevice()
    view = attached.arrivals.view(0, 0, len(attached.files["m.safetensors"]))
    registered = device.register(np.frombuffer(view, np.uint8))
    filled = []
    fill = Window.fill

    def counted(window: Window, begin: int, end: int, memory: np.ndarray) -> None:
        filled.append(end - begin)
        fill(window, begin, end, memory)

    monkeypatch.setattr(Window, "fill", counted)
    wanted = Wanted(slices={"wide": (1, 100, 200)})
    expected = {**tensors, "wide": tensors["wide"][:, 100:200]}
    check(device, attached.load(device, wanted=wanted, registered={0: registered}), expected)
    assert 80_000 <= sum(filled) < sum(device.copies) - 300_000
