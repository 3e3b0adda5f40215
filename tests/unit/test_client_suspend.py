"""Suspending a model and bringing it back: what must be the same, what stays when it is not, and copies under way."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import cached_client
from cached_client import _suspend, gpu
from cached_client._arrivals import Arrivals
from cached_client._index import TensorIndex
from cached_client._lease import Lease
from cached_client.errors import CacheError, DaemonUnavailableError, IntegrityError, InUseError, SuspendedError
from cached_client.gpu import GpuOptions, load
from cached_client.gpu.load import DeviceLoads
from cached_client.gpu.topology import Topology
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards
from tests.unit.gpu_support import LateDevice

FIRST = "model-00001-of-00002.safetensors"


BEFORE: set[str] = set()
"""Inodes that something of this process maps since before the test."""


@pytest.fixture
def daemon(tmp_path: Path):
    BEFORE.clear()
    BEFORE.update(inodes())
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected
    gc.collect()


def inodes() -> set[str]:
    """Of the stand-in's segments that this process maps; it has no mapping of its own."""
    return {line.split()[4] for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:segment" in line}


def mapped() -> int:
    return len(inodes() - BEFORE)


def test_other_content_of_the_same_revision_is_refused_and_the_right_one_still_comes_back(daemon, cache) -> None:
    files, tensors = two_shards()
    revision = daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        state = model.state_dict()
        model.suspend()
        assert mapped() == 0
        content = bytearray(files[FIRST])
        content[-1] ^= 1
        daemon.add("m", {**files, FIRST: bytes(content)})
        daemon._models["m"].revision = revision
        with pytest.raises(IntegrityError, match="not what it was") as caught:
            model.resume()
        assert caught.value.fields["path"] == FIRST
        daemon.add("m", {path: data for path, data in files.items() if path != "empty.txt"})
        daemon._models["m"].revision = revision
        with pytest.raises(IntegrityError, match=r"empty\.txt"):
            model.resume()
        assert model.suspended
        assert mapped() == 0
        eventually(lambda: daemon.lease_count == 0, "no lease is left")
        daemon.add("m", dict(reversed(files.items())))  # in another order: paths count, not numbers
        daemon._models["m"].revision = revision
        model.resume()
        assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
        assert all(model.read(path) == data for path, data in files.items())


def test_without_a_daemon_it_stays_suspended_until_there_is_one(daemon, cache) -> None:
    files, tensors = two_shards()
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        kept = model.tensor("layer.0.weight")
        cache.suspend()
        cache.suspend()
        daemon.stop()
        with pytest.raises(DaemonUnavailableError):
            cache.resume()
        with pytest.raises(SuspendedError):
            model.view(FIRST)
        daemon.start()
        cache.wait_ready(20)
        cache.resume()
        cache.resume()
        assert torch.equal(kept, tensors["layer.0.weight"])
        assert daemon.lease_count == 1


def test_tensors_of_a_mapping_that_was_replaced_come_back_too(daemon, cache) -> None:
    files, tensors = two_shards()
    daemon.add("m", files, arrived=False)
    info = next(iter(parse_header(files[FIRST], len(files[FIRST])).tensors.values()))
    with cache.attach("m") as model:
        for path in ("model.safetensors.index.json", FIRST):
            daemon.announce("m", path, 0, len(files[path]))
        early = model.tensor(info.name, timeout_s=20)
        daemon.stop()
        daemon.add("m", files, arrived=False)  # new segments, nothing in them
        daemon.start()
        eventually(lambda: len(daemon.attach_requests) == 2, "attached again")
        eventually(lambda: not model._arrivals.spans(list(files).index(FIRST)), "what was announced is forgotten")
        for path, content in files.items():
            daemon.announce("m", path, 0, len(content))
        daemon.complete("m")
        late = model.state_dict(timeout_s=60)[info.name]
        assert early.data_ptr() != late.data_ptr()
        model.suspend()
        assert mapped() == 0, "the replaced mapping goes, too"
        model.resume()
        assert torch.equal(early, tensors[info.name])
        assert torch.equal(late, tensors[info.name])


def test_a_copy_to_a_device_that_is_under_way_is_not_cut_off(daemon, cache, monkeypatch: pytest.MonkeyPatch) -> None:
    files, tensors = two_shards()
    daemon.add("m", files)
    late = LateDevice()
    monkeypatch.setattr(load, "open_device", lambda _: (late, Topology()))
    options = GpuOptions(threads=1, slot_bytes=4096)
    with cache.attach("m", wait=True) as model:
        stream = model.stream("cuda:0", gpu=options)
        next(stream)
        with pytest.raises(InUseError, match="under way"):
            model.suspend()
        stream.close()
        model.suspend()
        with pytest.raises(CacheError, match="suspended"):
            model.state_dict("cuda:0", gpu=options)
        model.resume()
        state = model.state_dict("cuda:0", gpu=options)
        assert all(
            torch.equal(state[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items()
        )
    gpu.release()


def test_a_segment_of_another_length_is_refused(daemon, cache) -> None:
    files, _ = two_shards()
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        model.suspend()
        os.ftruncate(daemon._models["m"].segments[FIRST], len(files[FIRST]) - 1)
        with pytest.raises(IntegrityError, match="bytes where"):
            model.resume()
        assert model.suspended
        assert mapped() == 0


def test_closing_waits_for_nobody_who_waits_to_suspend_or_to_resume(daemon, cache) -> None:
    files, _ = two_shards()
    daemon.add("m", files, arrived=False)
    model = cache.attach("m")
    with ThreadPoolExecutor(1) as pool:
        suspending = pool.submit(model.suspend)
        eventually(lambda: is_changing(model), "it waits")
        model.close()
        with pytest.raises(CacheError, match="closed"):
            suspending.result(20)
        daemon.complete("m")
        model = cache.attach("m", wait=True)
        model.suspend()
        daemon.add("m", files, arrived=False)
        resuming = pool.submit(model.resume)
        eventually(lambda: len(daemon.attach_requests) == 3, "it is asked for again")
        model.close()
        with pytest.raises(CacheError, match="closed"):
            resuming.result(20)
    eventually(lambda: daemon.lease_count == 0, "the end of a lease that may not have been opened yet")


def is_changing(model: cached_client.Model) -> bool:
    """Whether another thread suspends, resumes or closes it."""
    if free := model._changing.acquire(blocking=False):
        model._changing.release()
    return not free


def test_one_that_was_closed_while_suspended_says_so(daemon, cache) -> None:
    files, _ = two_shards()
    daemon.add("m", files)
    with cache.attach("m", wait=True) as model:
        model.suspend()
    with pytest.raises(CacheError, match="was closed"):
        model.names()


def test_nothing_of_the_lease_before_stays(daemon, cache) -> None:
    daemon.add("m", two_shards()[0])
    kinds = (Arrivals, DeviceLoads, Lease, TensorIndex)

    def counts() -> list[int]:
        gc.collect()
        objects = gc.get_objects()
        return [sum(type(one) is kind for one in objects) for kind in kinds]

    with cache.attach("m", wait=True) as model:
        before = counts()
        for _ in range(3):
            model.suspend()
            model.resume()
            assert model.names()
        assert counts() == before


@pytest.mark.parametrize("way", ["cached.sock", "link/cached.sock"])
def test_sockets_are_known_by_the_name_that_the_daemon_gave_its_own(
    daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(_suspend, "_DISCONNECT_S", 0.5)
    with cached_client.connect(str(tmp_path / way)) as cache:
        cache.list()
        cache.suspend()
        assert not connected(tmp_path)
        assert not caplog.records
        cache.list()
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(daemon.socket))
            cache.suspend()
            assert len(connected(tmp_path)) == 1
        assert "another cache to suspend?" in caplog.text


def connected(folder: Path) -> list[str]:
    """Sockets of this process that are connected to one in the folder."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            found += [name] if str(folder) in str(one.getpeername()) else []
    return found
