"""What `load` keeps of a process's models: the options of a first call, and nothing after `unload`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import cached_client
from cached_client import _process
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

FIRST = "model-00001-of-00002.safetensors"
PART = ["layer.0.weight"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as running:
        running.add("m", two_shards()[0])
        yield running
        cached_client.unload()


@pytest.mark.parametrize("end", ["closed", "damaged"])
def test_what_is_attached_again_has_the_options_of_before(daemon, end: str) -> None:
    target, options = daemon.target, {"only": PART, "source": "file:///a", "keep_alive_s": 5.0}
    model = cached_client.load("m", target=target, wait=True, **options)
    if end == "closed":
        model.close()
    else:
        header = daemon._models["m"].contents[FIRST].index(b"}}") + 2
        daemon.damage("m", FIRST, header, 100)
        eventually(lambda: model.damaged, "the damage")
        daemon.add("m", two_shards()[0])
    again = cached_client.load("m", target=target)
    assert again is not model
    assert again.names() == PART
    asked = daemon.attach_requests[-1]
    assert (asked.source, asked.keep_alive_s) == ("file:///a", 5.0)
    assert cached_client.load("m", target=target, **options) is again

    again.close()
    other = cached_client.load("m", target=target, only=["layer.1.weight"])
    assert other.names() == ["layer.1.weight"], "it was closed: others may be given"

    cached_client.unload("m", target=target)
    whole = cached_client.load("m", target=target)
    assert not whole.partial
    assert whole.names() == list(two_shards()[1])


def test_a_load_that_waits_while_the_model_is_unloaded_is_not_forgotten(daemon) -> None:
    target = daemon.target
    cached_client.load("m", target=target, only=PART)
    registry = _process._registry()
    [entry] = [entry for (path, _), entry in registry._entries.items() if path == str(daemon.socket)]
    loaded: list[cached_client.Model] = []
    loader = threading.Thread(target=lambda: loaded.append(cached_client.load("m", target=target)))
    unloader = threading.Thread(target=cached_client.unload, args=("m",), kwargs={"target": target})
    with entry.lock:
        loader.start()
        unloader.start()
        eventually(lambda: entry not in registry._entries.values(), "the entry to be forgotten")
    loader.join()
    unloader.join()
    assert not loaded[0].partial
    assert cached_client.load("m", target=target) is loaded[0]
    cached_client.unload()
    assert daemon.lease_count == 0
