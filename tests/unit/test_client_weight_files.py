"""Attaching: which files of a model hold its tensors, and what is said of those that are broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client.errors import FormatError
from cached_client.testing import FakeDaemon

INDEX = "model.safetensors.index.json"


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


def attach_complete(daemon, cache, files):
    daemon.add("m", files)
    return cache.attach("m", wait=True)


def test_a_duplicate_tensor_is_refused_with_both_files(daemon, cache) -> None:
    content = save({"a": torch.ones(2)})
    with attach_complete(daemon, cache, {"x.safetensors": content, "y.safetensors": content}) as model:
        with pytest.raises(FormatError, match=r"'a' is in x.safetensors and in y.safetensors"):
            model.names()
        assert model.read("x.safetensors") == content, "the files themselves can be had"


def test_the_models_index_chooses_the_weight_files(daemon, cache) -> None:
    index = json.dumps({"weight_map": {"a": "x.safetensors"}}).encode()
    content = save({"a": torch.ones(2)})
    files = {INDEX: index, "consolidated.safetensors": content, "x.safetensors": content}
    with attach_complete(daemon, cache, files) as model:
        assert model.names() == ["a"]


def test_files_in_folders_count_only_when_there_are_none_at_the_top(daemon, cache) -> None:
    content = save({"a": torch.ones(2)})
    with attach_complete(daemon, cache, {"2_Dense/model.safetensors": content}) as model:
        assert model.names() == ["a"]
    with attach_complete(daemon, cache, {"2_Dense/model.safetensors": content, "model.safetensors": content}) as model:
        assert model.names() == ["a"]


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"not json", "no weight_map"),
        (b'{"weight_map": {"a": 1}}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "b": "lost.safetensors"}}', r"names 'lost.safetensors'"),
    ],
)
def test_a_broken_index_is_named(daemon, cache, index: bytes, says: str) -> None:
    files = {INDEX: index, "x.safetensors": save({"a": torch.ones(2)})}
    with attach_complete(daemon, cache, files) as model, pytest.raises(FormatError, match=says):
        model.names()


def test_an_index_of_other_files_is_ignored(daemon, cache) -> None:
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    files = {INDEX: index, "model.safetensors": save({"a": torch.ones(2)})}
    with attach_complete(daemon, cache, files) as model:
        assert model.names() == ["a"]


def test_a_broken_header_is_named(daemon, cache) -> None:
    with attach_complete(daemon, cache, {"x.safetensors": b"\xff" * 100}) as model:
        with pytest.raises(FormatError, match=r"^x.safetensors is not a valid"):
            model.names()
        with pytest.raises(FormatError):
            list(model.stream())
