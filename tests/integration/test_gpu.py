"""S3 → memory → a device that copies late: the ring with a real daemon, also while the model downloads."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client import gpu
from cached_client.gpu import GpuOptions, load
from cached_client.gpu.topology import Topology
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files, refused
from tests.unit.gpu_support import LateDevice, gpu_threads, same

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
OPTIONS = GpuOptions(threads=2, slot_bytes=256 * 1024)


@pytest.fixture
def device(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[LateDevice]:
    late = LateDevice()
    monkeypatch.setattr(load, "open_device", lambda _: (late, Topology()))
    yield late
    gpu.release()
    gc.collect()
    assert late.pinned == []
    assert late.overwritten == 0
    assert gpu_threads() == []


def sharded(site: Site, **options: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, torch.Tensor] = {}
    files = model_files(MB, MB)
    for number, (path, count) in enumerate(zip(SHARDS, (4, 20), strict=True)):
        part = {f"{number}.{n}": torch.randn(500, 1024, generator=generator) for n in range(count)}
        files[path] = save(part)
        tensors |= part
    site.add("m", files, **options)
    site.start()
    return tensors


def test_tensors_are_on_the_device_while_the_rest_still_downloads(site: Site, device: LateDevice) -> None:
    expected = sharded(site)
    held = site.hold(SHARDS[1], times=-1)
    with site.attach("m") as model:
        stream = model.stream("cuda:0", timeout_s=60, gpu=OPTIONS)
        found = dict(next(stream) for _ in range(4))
        assert set(found) == {f"0.{n}" for n in range(4)}
        assert not model.complete
        held.release()
        found |= dict(stream)
        assert model.complete
        assert all(same(found[name], expected[name]) for name in expected)
        assert model.timings["device_first"] < model.timings["complete"]


def test_a_rank_gets_its_slices_of_a_model_that_arrives(site: Site, device: LateDevice) -> None:
    expected = sharded(site)
    with site.attach("m") as model:
        state = model.state_dict("cuda:0", 60, slices=lambda _: (1, 256, 512), gpu=OPTIONS)
        assert all(same(state[name], expected[name][:, 256:512]) for name in expected)
    assert sum(device.copies) <= sum(tensor.nbytes for tensor in state.values()) + 256 * len(state)


def test_a_model_that_fails_its_last_check_is_not_handed_over(site: Site, device: LateDevice) -> None:
    sharded(site, sha256={SHARDS[1]: "0" * 64})
    with refused("INTEGRITY"), site.attach("m") as model:
        model.state_dict("cuda:0", 60, gpu=OPTIONS)


def test_a_worker_that_leaves_gives_the_lease_back(site: Site, device: LateDevice) -> None:
    sharded(site)
    held = site.hold(SHARDS[1], times=-1)
    with site.attach("m") as model:
        stream = model.stream("cuda:0", timeout_s=60, gpu=OPTIONS)
        next(stream)
    with pytest.raises(cached_client.CacheError, match="closed"):
        list(stream)
    held.release()
    wait_for(lambda: not site.leases(), "no lease")


def test_a_resident_model_is_registered_when_it_is_loaded_again(site: Site, device: LateDevice) -> None:
    expected = sharded(site)
    again = GpuOptions(threads=2, slot_bytes=256 * 1024, register_after=1)
    with site.attach("m") as model:
        model.wait(60)
        for path in ("ring", "registered"):
            state = model.state_dict("cuda:0", gpu=again)
            assert model.device_report is not None
            assert (model.device_report.path, model.device_report.fallbacks) == (path, ())
            assert all(same(state[name], expected[name]) for name in expected)
