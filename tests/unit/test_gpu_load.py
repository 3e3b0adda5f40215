"""Loading an attached model to a device: the paths, what each falls back to, the report, and what is pinned when."""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cached_client
from cached_client import gpu
from cached_client.errors import DeviceError, InvalidRequestError, NotFoundError
from cached_client.gpu import GpuOptions, load
from cached_client.gpu.options import MIB, Geometry
from cached_client.gpu.ring import RINGS
from cached_client.gpu.topology import Topology, bound_to, parse_cpulist, topology_of
from cached_client.testing import FakeDaemon
from tests.unit.client_support import two_shards
from tests.unit.gpu_support import LateDevice, gpu_threads, same

SMALL = GpuOptions(threads=2, slot_bytes=4096)
REPEATED = dataclasses.replace(SMALL, register_after=1)


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def model(daemon: FakeDaemon):
    daemon.add("m", two_shards()[0])
    with cached_client.connect(daemon.target) as cache, cache.attach("m", wait=True) as attached:
        yield attached


@pytest.fixture
def expected():
    return two_shards()[1]


@pytest.fixture
def device(monkeypatch):
    """What stands in for every CUDA device; nothing of it may stay pinned."""
    late = LateDevice()
    use(monkeypatch, late)
    yield late
    gpu.release()
    assert late.pinned == []
    assert gpu_threads() == []


def use(monkeypatch, device: LateDevice, topology: Topology | None = None) -> None:
    monkeypatch.setattr(load, "open_device", lambda _: (device, topology or Topology()))
    monkeypatch.setattr(load, "_told", set())


def test_the_whole_model_on_a_device(model, device, expected) -> None:
    state = model.state_dict("cuda:0", gpu=SMALL)
    assert list(state) == model.names()
    assert all(same(state[name], expected[name]) for name in expected)
    report = model.device_report
    assert (report.device, report.path, report.fallbacks) == ("late:0", "ring", ())
    assert (report.threads, report.slot_bytes, report.steps) == (2, 4096, 3)
    assert report.copied_bytes == sum(device.copies)
    assert report.copies == len(device.copies)
    assert 0 < model.timings["device_first"] <= model.timings["device_complete"]
    assert len(device.allocated) == 2  # one buffer for each file


def test_the_ring_is_pinned_once_and_kept(model, device) -> None:
    for _ in range(3):
        model.state_dict("cuda:0", gpu=SMALL)
        dict(model.stream("cuda:0", gpu=SMALL))
    assert len(device.pinned) == 1
    ring = device.pinned[0]
    model.state_dict("cuda:0", gpu=GpuOptions(threads=1, slot_bytes=8192))
    assert len(device.pinned) == 1
    assert device.pinned[0] is not ring  # another shape: the old one was given back
    gpu.release()
    assert device.pinned == []


def test_two_loads_at_once_have_a_ring_each(model, device, expected) -> None:
    first, second = model.stream("cuda:0", gpu=SMALL), model.stream("cuda:0", gpu=SMALL)
    found = [dict([next(first)]), dict([next(second)])]
    assert len(device.pinned) == 2
    found[1].update(second)
    found[0].update(first)
    for one in found:
        assert all(same(one[name], expected[name]) for name in expected)
    assert len(device.pinned) == 1


def test_no_ring_is_kept_that_a_failed_device_may_still_read(model, device) -> None:
    device.failing = {"copy": 2, "drain": 1}
    with pytest.raises(DeviceError):
        model.state_dict("cuda:0", gpu=SMALL)
    assert RINGS._idle == {}


def test_a_child_process_does_not_have_its_parents_ring(model, device) -> None:
    model.state_dict("cuda:0", gpu=SMALL)
    kept = RINGS._idle
    RINGS._forget()
    try:
        assert RINGS._idle == {}
        assert len(device.pinned) == 1  # it is the parent's to unpin
    finally:
        RINGS._idle = kept


def test_rings_are_unpinned_when_the_process_ends() -> None:
    script = (
        "import atexit\n"
        "from tests.unit.gpu_support import SMALL, LateDevice\n"
        "from cached_client.gpu.ring import RINGS\n"
        "device = LateDevice()\n"
        "atexit.register(lambda: print('pinned', len(device.pinned)))\n"
        "RINGS.give_back(device, RINGS.take(device, SMALL, None), usable=True)\n"
        "print('pinned', len(device.pinned))\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=os.getcwd())
    assert ended.stdout == "pinned 1\npinned 0\n"


def test_without_pinned_memory_each_tensor_is_copied_and_that_is_said(model, monkeypatch, caplog, expected) -> None:
    use(monkeypatch, LateDevice(can_pin=False))
    monkeypatch.setattr("cached_client.attach.to_device", lambda tensor, device: tensor.clone())
    with caplog.at_level(logging.WARNING, "cached_client"):
        for _ in range(2):
            state = model.state_dict("cuda:0")
            assert all(same(state[name], expected[name]) for name in expected)
            assert model.device_report.path == "plain"
            assert model.device_report.fallbacks == ("no pinned memory for late:0",)
            assert model.device_report.copies == len(expected)
    assert [record.message for record in caplog.records] == [
        "copies to late:0 are slower than they could be: no pinned memory for late:0"
    ]


def test_a_ring_in_other_memory_is_said(model, device, monkeypatch) -> None:
    pin = device.pin
    monkeypatch.setattr(device, "pin", lambda size_bytes: (pin(size_bytes)[0], "refused; other memory is used"))
    model.state_dict("cuda:0", gpu=SMALL)
    assert model.device_report.path == "ring"
    assert model.device_report.fallbacks == ("refused; other memory is used",)


def test_a_model_that_is_loaded_again_is_registered_if_that_was_asked_for(model, device, expected) -> None:
    for path in ("ring", "registered", "registered"):
        state = model.state_dict("cuda:0", gpu=REPEATED)
        assert all(same(state[name], expected[name]) for name in expected)
        assert (model.device_report.path, model.device_report.fallbacks) == (path, ())
    assert len(device.pinned) == 1 + 2  # the ring, two files
    model.state_dict("cuda:0", gpu=SMALL)
    assert model.device_report.path == "ring"
    model.close()
    assert len(device.pinned) == 1


def test_a_device_that_refuses_the_mapping_gets_the_ring(model, device) -> None:
    device.can_register = False
    for _ in range(2):
        model.state_dict("cuda:0", gpu=REPEATED)
    assert model.device_report.path == "ring"
    assert model.device_report.fallbacks == ("the mapping was not registered: late:0 cannot register read-only memory",)
    assert len(device.pinned) == 1


def test_a_registration_that_fails_in_the_middle_leaves_nothing_pinned(model, device) -> None:
    device.failing = {"register": 2}
    for _ in range(2):
        model.state_dict("cuda:0", gpu=REPEATED)
    assert model.device_report.path == "ring"
    assert len(model.device_report.fallbacks) == 1
    assert len(device.pinned) == 1


def test_without_its_daemon_a_model_is_not_registered_but_loads(model, daemon, device) -> None:
    model.state_dict("cuda:0", gpu=REPEATED)
    daemon.stop()
    model.state_dict("cuda:0", gpu=REPEATED)
    assert model.device_report.path == "ring"
    assert "was not registered" in model.device_report.fallbacks[0]


def test_a_model_closed_under_a_load_is_unpinned_after_it(model, device) -> None:
    model.state_dict("cuda:0", gpu=REPEATED)
    stream = model.stream("cuda:0", gpu=REPEATED)
    next(stream)
    model.close()
    with pytest.raises(cached_client.CacheError):
        list(stream)
    assert len(device.pinned) <= 1


def test_a_device_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="finds no GPU") as raised:
        load.open_device(torch.device("cuda:0"))
    assert "CUDA_VISIBLE_DEVICES" in raised.value.hint


def test_devices_by_name(model, expected) -> None:
    with pytest.raises(InvalidRequestError, match="knows no device 'gpu'"):
        model.state_dict("gpu")
    with pytest.raises(InvalidRequestError, match="knows no device 'gpu'"):
        next(model.stream("gpu"))
    on_cpu = model.state_dict("cpu")
    assert all(on_cpu[name].data_ptr() == model.tensor(name).data_ptr() for name in expected)
    before: Any = model.device_report
    assert before is None
    elsewhere = model.state_dict("meta")
    assert {tensor.device.type for tensor in elsewhere.values()} == {"meta"}
    assert (model.device_report.device, model.device_report.path) == ("meta", "plain")


@pytest.mark.parametrize("where", ["xpu", "mps", "hpu"])
def test_a_device_that_this_torch_lacks(model, where: str) -> None:
    try:
        torch.empty(1).to(where)
    except Exception as error:  # a RuntimeError, an AssertionError, an ImportError
        raised_by_torch = type(error)
    else:
        pytest.skip(f"there is such a device: {where}")
    for load_it in (lambda: model.state_dict(where), lambda: next(model.stream(where))):
        with pytest.raises(DeviceError, match=f"{where} cannot be used") as raised:
            load_it()
        assert type(raised.value.__cause__) is raised_by_torch
        assert raised.value.fields["device"] == where
        assert torch.__version__ in raised.value.hint


@pytest.mark.parametrize("where", ["cpu", "cuda:0"])
def test_slices(model, device, expected, where: str) -> None:
    slices = {"layer.0.weight": (1, 3, 20), "layer.4.weight": (0, 8, 16)}
    state = model.state_dict(where, slices=slices, gpu=SMALL)
    for name, whole in expected.items():
        dim, start, stop = slices.get(name, (0, 0, whole.shape[0]))
        assert same(state[name], whole.narrow(dim, start, stop - start))
    half = dict(model.stream(where, slices=lambda info: (0, 0, info.shape[0] // 2), gpu=SMALL))
    assert all(same(half[name], whole[: whole.shape[0] // 2]) for name, whole in expected.items())
    with pytest.raises(NotFoundError, match="no tensor 'typo'"):
        model.state_dict(where, slices={"typo": (0, 0, 1)}, gpu=SMALL)
    with pytest.raises(InvalidRequestError, match="does not fit"):
        model.state_dict(where, slices={"layer.0.weight": (0, 0, 65)}, gpu=SMALL)


def test_chosen_tensors(model, device, expected) -> None:
    found = dict(model.stream("cuda:0", names=["layer.1.weight"], gpu=SMALL))
    assert list(found) == ["layer.1.weight"]
    with pytest.raises(NotFoundError, match="no tensor 'typo'"):
        list(model.stream("cuda:0", names=["typo"], gpu=SMALL))


def test_into_a_module(model, device, expected) -> None:
    module = torch.nn.Module()
    module.layer = torch.nn.ModuleList(torch.nn.Module() for _ in range(6))
    for name, tensor in expected.items():
        _, index, kind = name.split(".")
        module.layer[int(index)].register_parameter(kind, torch.nn.Parameter(torch.empty_like(tensor, device="meta")))
    missing, unexpected = model.load_into(module, "cuda:0", gpu=SMALL)
    assert (list(missing), list(unexpected)) == ([], [])
    assert all(same(tensor.detach(), expected[name]) for name, tensor in module.named_parameters())


def test_the_threads_of_the_ring_run_near_the_gpu(model, device, monkeypatch) -> None:
    processor = min(os.sched_getaffinity(0))
    use(monkeypatch, device, Topology(3, frozenset({processor}), 5))
    seen = []
    copy = device.copy

    def record(*arguments) -> None:
        seen.append(os.sched_getaffinity(0))
        copy(*arguments)

    monkeypatch.setattr(device, "copy", record)
    model.state_dict("cuda:0", gpu=SMALL)
    assert set(map(frozenset, seen)) == {frozenset({processor})}
    assert (model.device_report.numa_node, model.device_report.pcie_generation) == (3, 5)
    model.state_dict("cuda:0", gpu=dataclasses.replace(SMALL, bind=False))
    assert model.device_report.numa_node is None


def test_topology_is_read_from_sysfs(tmp_path: Path) -> None:
    folder = tmp_path / "0000:3b:00.0"
    folder.mkdir()
    (folder / "max_link_speed").write_text("32.0 GT/s PCIe\n")
    (folder / "numa_node").write_text("1\n")
    (folder / "local_cpulist").write_text("0-4095\n")
    allowed = frozenset(os.sched_getaffinity(0))
    assert topology_of("0000:3B:00.0", tmp_path) == Topology(1, allowed, 5)
    (folder / "numa_node").write_text("-1\n")
    assert topology_of("0000:3b:00.0", tmp_path) == Topology(None, None, 5)
    (folder / "numa_node").write_text("1\n")
    (folder / "local_cpulist").write_text("4095\n")
    assert topology_of("0000:3b:00.0", tmp_path) == Topology(None, None, 5)
    assert topology_of("0000:00:00.0", tmp_path) == topology_of(None) == Topology()


def test_lists_of_processors() -> None:
    assert parse_cpulist("0-2,8,10-11") == {0, 1, 2, 8, 10, 11}
    assert [parse_cpulist(text) for text in ("", "a-b", "1,x", "-1")] == [set()] * 4


def test_a_binding_ends(monkeypatch) -> None:
    before = os.sched_getaffinity(0)
    with bound_to(frozenset({min(before)})):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with bound_to(frozenset({4095})):
        assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(
    ("generation", "processors", "threads", "slot_mib"),
    [(4, 64, 4, 4), (5, 64, 8, 2), (None, 64, 4, 4), (6, 64, 12, 2), (5, 6, 6, 2.668), (5, 2, 2, 4)],
)
def test_the_default_ring(generation, processors, threads, slot_mib) -> None:
    geometry = Geometry.choose(GpuOptions(), generation, processors)
    assert geometry.threads == threads
    assert geometry.slot_bytes / MIB == pytest.approx(slot_mib, abs=0.005)
    assert geometry.steps == 3


@pytest.mark.parametrize("wrong", [{"threads": 0}, {"slot_bytes": 1}, {"steps": 1}, {"ahead_bytes": 0}])
def test_options_that_make_no_sense(wrong) -> None:
    with pytest.raises(InvalidRequestError):
        GpuOptions(**wrong)
