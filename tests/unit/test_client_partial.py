"""A part of a model as a worker sees it: what was selected, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cached_client
from cached_client._proto import cached_pb2 as pb
from cached_client._selected import Selected
from cached_client.errors import CacheError, InvalidRequestError, NotFoundError, TimeoutExpiredError
from cached_client.safetensors_header import parse_header
from cached_client.testing import FakeDaemon
from tests.unit.client_support import eventually, two_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def daemon(tmp_path: Path):
    with FakeDaemon(tmp_path) as running:
        yield running


@pytest.fixture
def cache(daemon: FakeDaemon):
    with cached_client.connect(daemon.target) as connected:
        yield connected


def place(files: dict[str, bytes], path: str, name: str) -> tuple[int, int]:
    info = parse_header(files[path], len(files[path])).tensors[name]
    return info.begin, info.end


def some_names(files: dict[str, bytes], path: str) -> list[str]:
    return list(parse_header(files[path], len(files[path])).tensors)


def test_a_part_has_what_was_selected_once_it_is_announced_and_nothing_else(daemon, cache) -> None:
    files, tensors = two_shards()
    wanted, other = some_names(files, SECOND)[:2]
    daemon.add("m", files, arrived=False)
    with cache.attach("m", only=[wanted], files=["config*"] if "config.json" in files else ()) as model:
        assert model.partial
        assert model.names(1) == [wanted]
        assert not model.complete
        with pytest.raises(TimeoutExpiredError):
            model.raw(wanted, 0.05)
        daemon.announce("m", SECOND, *place(files, SECOND, wanted))
        assert torch.equal(model.tensor(wanted, 20), tensors[wanted])
        daemon.complete("m")
        assert model.wait(20).partial
        assert list(model.state_dict()) == [wanted]
        for name in (other, *some_names(files, FIRST), "no.such"):
            with pytest.raises(NotFoundError, match="left out") as caught:
                model.raw(name)
            assert caught.value.fields["tensor"] == name
        with pytest.raises(NotFoundError, match="left out"):
            list(model.stream(names=[wanted, other]))
        with pytest.raises(NotFoundError, match="left out"):
            model.view(SECOND)
        assert model.directory is None


def test_completion_makes_nothing_readable_but_what_was_selected(daemon, cache) -> None:
    files, tensors = two_shards()
    daemon.add("m", files, arrived=False)
    name = some_names(files, FIRST)[-1]
    with cache.attach("m", only=[name]) as model:
        daemon.complete("m")
        model.wait(20)
        begin, end = place(files, FIRST, name)
        index = list(files).index(FIRST)
        assert model.tensor(name).shape == tensors[name].shape
        assert model._arrivals.view(index, begin, end) is not None
        assert model._arrivals.view(index, begin - 1, end) is None
        assert model._arrivals.view(index, 0, 8) is None


def test_a_module_takes_the_part_that_it_has(daemon, cache) -> None:
    files, tensors = two_shards()
    name = some_names(files, FIRST)[0]
    daemon.add("m", files)
    module = torch.nn.Module()
    with cache.attach("m", only=[name]) as model:
        missing, unexpected = model.load_into(module, strict=False)
        assert (missing, unexpected) == ([], [name])
        assert torch.equal(model.state_dict()[name], tensors[name])


def test_a_lease_on_a_part_is_taken_up_with_the_ranges_that_it_had(daemon, cache) -> None:
    files, _ = two_shards()
    name = some_names(files, SECOND)[0]
    daemon.add("m", files)
    with cache.attach("m", only=[name], wait=True):
        daemon.stop()
        daemon.start()
        eventually(lambda: daemon.lease_count == 1, "the lease to be taken up again")
        request = daemon.attach_requests[-1]
        begin, end = place(files, SECOND, name)
        assert request.resume
        assert not request.selection.tensors
        held = [(item.file_index, item.offset_bytes, item.length_bytes) for item in request.selection.held]
        assert held == [(list(files).index(SECOND), begin, end - begin)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"only": []},
        {"only": "model.*"},
        {"first": [""]},
        {"only": ["a"], "first": ["b"]},
        {"files": ["config.json"]},
        {"only": [], "files": "config.json"},
    ],
)
def test_selections_that_mean_nothing_are_refused_before_anything_is_asked(daemon, cache, wrong) -> None:
    with pytest.raises(InvalidRequestError):
        cache.attach("m", **wrong)
    assert not daemon.attach_requests


def test_a_pattern_that_matches_nothing_is_refused(daemon, cache) -> None:
    daemon.add("m", two_shards()[0])
    with pytest.raises(NotFoundError) as caught:
        cache.attach("m", only=["no.such.*"])
    assert caught.value.fields["pattern"] == "no.such.*"


def test_a_tensor_outside_of_its_file_is_refused() -> None:
    tensor = pb.Selected.Tensor(file_index=0, name="t", dtype="U8", shape=[9], begin=2, end=11)
    assert Selected(pb.Selected(tensors=[tensor]), [11]).ranges() == [(0, 2, 9)]
    for sizes in ([10], []):
        with pytest.raises(CacheError, match="outside of its file"):
            Selected(pb.Selected(tensors=[tensor]), sizes)
