"""A model set aside around a snapshot of the process: what goes, what comes back, what is refused."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client._arrivals import Deadline
from cached_client._proto import cached_pb2 as pb
from cached_client._suspend import content_of
from cached_client.errors import ChangedError, NotFoundError, SuspendedError, TimeoutExpiredError
from tests.integration.harness import wait_for
from tests.integration.support import MB, ROOT, Site, model_files, refused

WEIGHTS = "model.safetensors"
CLIENT_THREADS = ("cached-lease",)


@pytest.fixture(autouse=True)
def collected(site: Site) -> Iterator[None]:
    """A caught error's traceback ties the test's frame, and its tensors, into a cycle: ended before the checks."""
    yield
    gc.collect()


def published(site: Site, name: str = "m", seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{n}.weight": torch.randn(300, 1000, generator=generator) for n in range(4)}
    site.add(name, {**model_files(MB), WEIGHTS: save(tensors)})
    return tensors


def mappings(site: Site) -> list[str]:
    """The daemon's segments that this process maps or has open."""
    instance = site.daemon.segments()[0].name.split(".")[1] if site.daemon.segments() else "cached."
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if instance in line]
    return mapped + [target for target in targets() if instance in target]


def targets() -> list[str]:
    """What the descriptors of this process lead to."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the listing's own
            continue
    return found


def equal(model: cached_client.Model, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(model.tensor(name), tensor) for name, tensor in expected.items())


def test_everything_goes_and_the_same_tensors_come_back_after_an_eviction(site: Site) -> None:
    expected = published(site)
    site.start()
    with site.cache() as cache:
        model = cache.attach("m", wait=True, timeout_s=60)
        state = model.state_dict()
        array, view = model.numpy("layer.0.weight"), model.view(WEIGHTS)
        pointers = {name: tensor.data_ptr() for name, tensor in state.items()}
        assert mappings(site)
        cache.suspend(timeout_s=60)
        assert not mappings(site), "no mapping and no descriptor is left"
        assert [lease.name for lease in site.leases()] == []
        assert not [thread for thread in sys.modules["threading"].enumerate() if thread.name in CLIENT_THREADS]
        assert model.suspended
        assert "suspended" in repr(model)
        with pytest.raises(SuspendedError, match="resume"):
            model.tensor("layer.0.weight")
        with pytest.raises(SuspendedError):
            model.names()
        site.evict("m")
        wait_for(lambda: not site.segments("blob"), "the segments to be free: nobody maps them")
        cache.resume(60)
        assert not model.suspended
        assert [lease.name for lease in site.leases()] == ["m"]
        assert {name: tensor.data_ptr() for name, tensor in state.items()} == pointers
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert np.array_equal(array, expected["layer.0.weight"].numpy())
        assert bytes(view) == site.files["m"][WEIGHTS]
        assert equal(model, expected)
        assert model.state_dict()["layer.1.weight"].data_ptr() == pointers["layer.1.weight"], "mapped once, not twice"
        state["layer.2.weight"].add_(1)
        with pytest.raises(ChangedError, match=r"layer\.2\.weight"):
            cache.suspend()
        cache.suspend(discard_changes=True)
        cache.resume(60)
        assert torch.equal(state["layer.2.weight"], expected["layer.2.weight"]), "the written page was given up"
        del array, view


def test_a_part_comes_back_as_that_part_whether_or_not_the_rest_is_there(site: Site) -> None:
    expected = published(site)
    site.start()
    name = "layer.2.weight"
    for whole in (False, True):
        with site.cache() as cache:
            if whole:
                cache.attach("m", wait=True).close()
            with cache.attach("m", only=["layer.2.*"], wait=True) as model:
                tensor = model.tensor(name)
                model.suspend()
                if not whole:
                    site.evict("m")
                model.resume()
                assert model.partial
                assert model.names() == [name]
                assert torch.equal(tensor, expected[name])
                assert torch.equal(model.state_dict(timeout_s=60)[name], expected[name])
                del tensor


def test_the_daemon_may_be_another_one_by_then(site: Site) -> None:
    expected = published(site)
    site.start()
    with site.cache() as cache, cache.attach("m", wait=True, timeout_s=60) as model:
        state = model.state_dict()
        cache.suspend(timeout_s=60)
        site.daemon.restart(kill=True)
        cache.resume(60)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_one_written_byte_anywhere_is_found_and_keeps_all_models_as_they_are(site: Site) -> None:
    published(site, "a")
    expected = published(site, "b", seed=4)
    site.start()
    with site.cache() as cache:
        a, b = (cache.attach(name, wait=True, timeout_s=60) for name in "ab")
        state = a.state_dict()
        assert sum(float(tensor.sum()) for tensor in state.values()), "reading is no writing"
        a.check_suspendable(timeout_s=60)
        state["layer.3.weight"].view(-1)[-1] = 1.0
        with refused("CHANGED") as told:
            cache.suspend()
        assert (told["path"], told["tensors"]) == (WEIGHTS, "layer.3.weight")
        assert not a.suspended
        assert equal(b, expected)
        assert len(site.leases()) == 2
        b.suspend()
        b.close()
        b.resume()
        assert b.closed
        assert not b.suspended
        assert len(site.leases()) == 1


def test_what_was_removed_meanwhile_fails_loudly_and_can_be_tried_again(site: Site) -> None:
    expected = published(site)
    site.start()
    with site.cache() as cache, cache.attach("m", wait=True, timeout_s=60) as model:
        state = model.state_dict()
        cache.suspend(timeout_s=60)
        with site.rpc() as stub:
            stub.Remove(pb.RemoveRequest(ref="m"))
        other = {**site.files["m"], WEIGHTS: save({name: tensor + 1 for name, tensor in expected.items()})}
        before = site.files["m"]
        site.add("m", other)
        site.pull("m")
        with pytest.raises(NotFoundError, match=model.revision[:12]):
            cache.resume(60)
        assert model.suspended
        assert not site.leases()
        with pytest.raises(SuspendedError):
            model.tensor("layer.0.weight")
        # The old content is back at the origin, under its old version marker: then it is the same revision again.
        site.add("m", before)
        assert site.pull("m")[-1].revision == model.revision
        cache.resume(60)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_an_incomplete_model_is_waited_for(site: Site) -> None:
    expected = published(site)
    site.start()
    held = site.hold(WEIGHTS, times=-1)
    with site.cache() as cache, cache.attach("m", timeout_s=60) as model:
        with pytest.raises(TimeoutExpiredError):
            model.suspend(timeout_s=0.2)
        assert not model.suspended
        held.release()
        model.suspend(timeout_s=60)
        model.resume(60)
        assert equal(model, expected)


LEFT = """
import json, os, sys, threading
from pathlib import Path
import cached_client

def left():
    fds = [os.readlink(path) for fd in os.listdir("/proc/self/fd") if os.path.exists(path := f"/proc/self/fd/{fd}")]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {
        "sockets": sum(target.startswith("socket:") for target in fds),
        "segments": sum("/dev/shm/cached." in text for text in [*fds, *maps]),
        "threads": sum(thread.name.startswith("cached") for thread in threading.enumerate()),
    }

cache = cached_client.connect(sys.argv[1])
model = cache.attach("m", wait=True, timeout_s=60)
total = float(model.tensor("layer.0.weight").sum())
during = left()
cache.suspend()
after = left()
cache.resume(60)
tensor = model.tensor("layer.0.weight")
print(json.dumps({"during": during, "after": after, "same": float(tensor.sum()) == total}), flush=True)
model.suspend()
print(tensor.sum(), flush=True)
"""


def test_a_daemon_that_does_not_answer_is_not_waited_for_longer_than_asked(site: Site) -> None:
    """It is asked for digests that it was still computing when it announced the model as complete."""
    published(site)
    site.start()
    site.pull("m")
    unknown = SimpleNamespace(infos=lambda: [SimpleNamespace(path=WEIGHTS, size_bytes=1, sha256="")])
    with site.cache() as cache:
        site.daemon.signal(signal.SIGSTOP)
        try:
            with pytest.raises(TimeoutExpiredError):
                content_of(cache.connection, pb.AttachRequest(ref="m"), unknown, Deadline(0.5))  # type: ignore[arg-type]
        finally:
            site.daemon.signal(signal.SIGCONT)


def test_nothing_is_left_that_a_snapshot_could_not_hold_and_a_touch_ends_the_process(site: Site) -> None:
    published(site)
    site.start()
    script = [sys.executable, "-c", LEFT, str(site.daemon.socket)]
    ran = subprocess.run(script, cwd=ROOT, capture_output=True, text=True)
    [line] = ran.stdout.splitlines()
    told = json.loads(line)
    assert all(told["during"].values()), "there was something to go"
    assert told["after"] == {"sockets": 0, "segments": 0, "threads": 0}
    assert told["same"]
    assert ran.returncode == -signal.SIGSEGV, "rather than give garbage"
