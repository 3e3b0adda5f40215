"""What a warm attach costs in steps, not in seconds: requests to the daemon, headers read; and what runs of tensors do
when bytes are taken back between two steps."""

from __future__ import annotations

import pytest
import torch

import cached_client
from cached_client import _index
from cached_client.errors import IntegrityError
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def daemon(tmp_path):
    with FakeDaemon(tmp_path) as running:
        running.add("m", two_shards()[0])
        yield running


@pytest.fixture
def cache(daemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


def test_a_warm_attach_asks_once_and_reads_each_header_once(daemon, cache, monkeypatch) -> None:
    read: list[str] = []
    parse = parse_header

    def counted(prefix, size_bytes, *, path):
        read.append(path)
        return parse(prefix, size_bytes, path=path)

    monkeypatch.setattr(_index, "parse_header", counted)
    with cache.attach("m", wait=True) as model:
        tensors = model.state_dict()
        assert list(tensors) == model.names()
        assert all(model.info(name).name == name for name in tensors)
        assert dict(model.stream()).keys() == tensors.keys()
    assert len(read) == len(set(read)) == 2
    assert len(daemon.attach_requests) == 1


def test_tensors_of_a_state_dict_have_storages_of_their_own(cache) -> None:
    with cache.attach("m", wait=True) as model:
        tensors = model.state_dict()
    for name, expected in two_shards()[1].items():
        assert torch.equal(tensors[name], expected)
        assert tensors[name].untyped_storage().nbytes() == expected.numel() * expected.element_size()


def test_a_damaged_tensor_costs_its_neighbours_nothing(daemon, cache) -> None:
    told: list[cached_client.DamagedRange] = []
    with cache.attach("m", wait=True, on_damaged=told.append) as model:
        info = model.info("layer.1.weight")
        daemon.damage("m", FIRST, info.begin, 1)
        eventually(lambda: told, "the callback")
        found = model.stream()
        assert next(found)[0] == "layer.0.weight"
        with pytest.raises(IntegrityError, match="attach again"):
            next(found)
        with pytest.raises(IntegrityError, match="attach again"):
            model.state_dict()


def test_damage_that_is_found_between_two_steps_counts(daemon, cache) -> None:
    told: list[cached_client.DamagedRange] = []
    with cache.attach("m", wait=True, on_damaged=told.append) as model:
        found = model.stream()
        assert next(found)[0] == "layer.0.weight"
        daemon.damage("m", FIRST, model.info("layer.2.weight").begin, 1)
        eventually(lambda: told, "the callback")
        assert next(found)[0] == "layer.1.weight"
        with pytest.raises(IntegrityError, match="attach again"):
            next(found)
