"""Models that a process attaches once: shared by threads, attached anew by a child, suspended together."""

from __future__ import annotations

import gc
import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client.errors import InvalidRequestError, NoSourceError, SuspendedError
from tests.integration.harness import wait_for
from tests.integration.support import MB, Site, model_files

WEIGHTS = "model.safetensors"


@pytest.fixture
def target(site: Site) -> Iterator[str]:
    """The daemon's socket; nothing of this process stays attached to it."""
    yield str(site.daemon.socket)
    cached_client.unload()
    gc.collect()


def published(site: Site, name: str = "m") -> dict[str, torch.Tensor]:
    tensors = {f"{name}.{n}": torch.randn(100, 100) for n in range(3)}
    site.add(name, {**model_files(MB), WEIGHTS: save(tensors)})
    return tensors


def test_many_threads_attach_once_while_it_downloads(site: Site, target: str) -> None:
    expected = published(site)
    site.start()
    held = site.hold(WEIGHTS, times=-1)
    got: list[tuple[cached_client.Model, bool]] = []

    def handler() -> None:
        model = cached_client.load("m", target=target, timeout_s=60)
        got.append((model, all(torch.equal(model.tensor(name, 60), value) for name, value in expected.items())))

    threads = [threading.Thread(target=handler) for _ in range(16)]
    for thread in threads:
        thread.start()
    wait_for(site.leases, "the lease")
    held.release()
    for thread in threads:
        thread.join()
    assert len(got) == 16
    assert all(right for _, right in got)
    assert len({id(model) for model, _ in got}) == 1
    assert len(site.leases()) == 1
    assert len(site.daemon.log_events("lease.opened")) == 1


def test_references_to_the_same_revision_are_one_model(site: Site, target: str) -> None:
    published(site)
    site.start()
    model = cached_client.load("m", target=target, wait=True, timeout_s=60)
    assert cached_client.load(f"m@{model.revision}", target=target, timeout_s=60) is model
    wait_for(lambda: len(site.leases()) == 1, "the second lease to be given back")
    with pytest.raises(InvalidRequestError, match="unload"):
        cached_client.load("m", target=target, client_name="another")
    cached_client.unload("m", target=target)
    assert model.closed
    assert not site.leases()
    again = cached_client.load("m", target=target, client_name="another", wait=True, timeout_s=60)
    assert again is not model
    newer = published(site)
    site.pull("m")
    assert cached_client.load("m", target=target) is again, "a newer revision comes with unload"
    cached_client.unload("m", target=target)
    fresh = cached_client.load("m", target=target, wait=True, timeout_s=60)
    assert fresh.revision != model.revision
    assert torch.equal(fresh.tensor("m.1"), newer["m.1"])


def test_one_that_was_closed_is_attached_again_and_a_failure_is_not_kept(site: Site, target: str) -> None:
    expected = published(site)
    site.start()
    with pytest.raises(NoSourceError):
        cached_client.load("later", target=target)
    with cached_client.load("m", target=target, wait=True, timeout_s=60) as model:
        kept = model.tensor("m.0")
    assert not site.leases()
    again = cached_client.load("m", target=target, timeout_s=60)
    assert again is not model
    assert torch.equal(kept, expected["m.0"])
    published(site, "later")
    site.reload_catalog()
    assert cached_client.load("later", target=target, wait=True, timeout_s=60).complete
    cached_client.unload()
    assert not site.leases()


def _in_child(target: str, name: str, results) -> None:
    model = cached_client.load("m", target=target, wait=True, timeout_s=60)
    results.put((model.tensor(name).sum().item(), len(cached_client.connect(target).list())))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_attaches_for_itself(site: Site, target: str) -> None:
    expected = published(site)
    site.start()
    model = cached_client.load("m", target=target, wait=True, timeout_s=60)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_in_child, args=(target, "m.2", results))
    child.start()
    total, models = results.get(timeout=60)
    child.join(60)
    assert (child.exitcode, models) == (0, 1)
    assert total == expected["m.2"].sum().item()
    wait_for(lambda: len(site.leases()) == 1, "the child's lease to end, and the parent's to stay")
    assert torch.equal(model.tensor("m.2"), expected["m.2"])
    results.close()


def test_all_are_suspended_and_resumed_together(site: Site, target: str) -> None:
    expected = published(site)
    published(site, "n")
    site.start()
    first, second = (cached_client.load(name, target=target, wait=True, timeout_s=60) for name in "mn")
    tensor = first.tensor("m.0")
    cached_client.suspend(timeout_s=60)
    assert not site.leases()
    with pytest.raises(SuspendedError):
        cached_client.load("m", target=target)
    cached_client.resume(60)
    assert torch.equal(tensor, expected["m.0"])
    assert cached_client.load("n", target=target) is second
    assert len(site.leases()) == 2
