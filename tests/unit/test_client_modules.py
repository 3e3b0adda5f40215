"""Modules from a model's tensors: names, tied parameters, buffers, dtypes, and the slices of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import cached_client
from cached_client.errors import InvalidRequestError
from cached_client.testing import FakeDaemon


class Tied(torch.nn.Module):
    """Embedding and head are one parameter; the position ids are in no checkpoint."""

    def __init__(self, ids_device: str | None = None) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.body = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("ids", torch.arange(10, device=ids_device), persistent=False)

    def forward(self, ids):
        return self.head(self.body(self.embed(ids)) * self.scale)


class Mlp(torch.nn.Module):
    """Column-parallel up, row-parallel down."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(hidden, inner, bias=False)
        self.down = torch.nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


DIMS = {"*up.weight": 0, "*down.weight": 1}


@pytest.fixture
def attach(tmp_path: Path):
    @contextmanager
    def attached(tensors: dict[str, torch.Tensor]) -> Iterator[cached_client.Model]:
        with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
            daemon.add("m", {"model.safetensors": save(tensors)})
            with cache.attach("m") as model:
                yield model

    return attached


def weights(module: torch.nn.Module, *without: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in module.state_dict().items() if name not in without}


def meta(make, *arguments):
    with torch.device("meta"):
        return make(*arguments)


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameters_need_one_name_and_stay_one(attach, kept: str) -> None:
    left_out = ({"embed.weight", "head.weight"} - {kept}).pop()
    source = weights(Tied(), left_out)
    with attach(source) as model:
        for module in (meta(Tied, "cpu"), Tied()):
            found = model.load_into(module)
            assert (found.missing_keys, found.unexpected_keys) == ([], [])
            assert module.head.weight is module.embed.weight
            assert torch.equal(module.embed.weight, source[kept])
            assert not module.embed.weight.is_meta
            module(torch.tensor([1, 2]))
        assert model.tensor(kept).data_ptr() in {p.data_ptr() for p in load(model).parameters()}


def load(model: cached_client.Model, **options) -> torch.nn.Module:
    module = meta(Tied, "cpu")
    model.load_into(module, **options)
    return module


def test_tied_parameters_that_differ_are_refused(attach) -> None:
    source = weights(Tied())
    with attach(source) as model, pytest.raises(InvalidRequestError, match="one parameter"):
        model.load_into(meta(Tied, "cpu"))
    with attach(source | {"head.weight": source["embed.weight"].clone()}) as model:
        assert load(model).head.weight is not None


def test_a_buffer_on_meta_that_nobody_has_is_refused_before_anything_is_waited_for(tmp_path: Path) -> None:
    with FakeDaemon(tmp_path) as daemon, cached_client.connect(daemon.target) as cache:
        daemon.add("m", {"model.safetensors": save(weights(Tied()))}, arrived=False)
        with cache.attach("m") as model, pytest.raises(InvalidRequestError, match="no checkpoint: ids") as caught:
            model.load_into(meta(Tied))
    assert caught.value.fields["value"] == "ids"


def test_without_strict_what_is_missing_is_told_and_left(attach) -> None:
    source = weights(Tied(), "head.weight", "body.bias")
    with attach(source | {"extra": torch.ones(1)}) as model:
        with pytest.raises(RuntimeError, match=r"Missing key.*body\.bias"):
            model.load_into(meta(Tied, "cpu"))
        module = meta(Tied)
        found = model.load_into(module, strict=False)
        assert (found.missing_keys, found.unexpected_keys) == (["body.bias"], ["extra"])
        assert module.body.bias.is_meta
        assert module.ids.is_meta


def test_dtype_is_cast_for_what_is_assigned_and_integers_stay(attach) -> None:
    source = weights(Tied(), "head.weight")
    with attach(source | {"count": torch.tensor([3])}) as model:
        module = meta(Tied, "cpu")
        module.register_buffer("count", torch.zeros(1, dtype=torch.int64))
        model.load_into(module, dtype=torch.bfloat16)
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert (module.count.dtype, module.count.item()) == (torch.int64, 3)
        assert torch.equal(module.body.weight, source["body.weight"].bfloat16())


def test_names_are_mapped_by_a_function_or_a_mapping(attach) -> None:
    source = {f"bert.{name}": tensor for name, tensor in weights(Tied(), "head.weight").items()}
    source["pooler.weight"] = torch.ones(2)

    def rename(name: str) -> str | None:
        return name.removeprefix("bert.") if name.startswith("bert.") else None

    with attach(source) as model:
        assert torch.equal(load(model, rename=rename).body.weight, source["bert.body.weight"])
        mapping = {name: name.removeprefix("bert.") for name in source}
        with pytest.raises(RuntimeError, match=r"Unexpected key.*pooler\.weight"):
            load(model, rename=mapping)
        assert torch.equal(load(model, rename=mapping, strict=False).body.bias, source["bert.body.bias"])
        with pytest.raises(InvalidRequestError, match="would both be 'x'"):
            load(model, rename=lambda _: "x")


def test_two_ranks_have_what_the_whole_has(attach) -> None:
    whole = Mlp(6, 8)
    source = weights(whole)
    whole.load_state_dict(source)
    x = torch.randn(3, 6)
    with attach(source) as model:
        states = [model.state_dict(slices=cached_client.shard(rank, 2, DIMS)) for rank in range(2)]
        assert torch.equal(torch.cat([state["up.weight"] for state in states], 0), source["up.weight"])
        assert torch.equal(torch.cat([state["down.weight"] for state in states], 1), source["down.weight"])
        assert states[1]["up.weight"].data_ptr() == model.tensor("up.weight").data_ptr() + 4 * 6 * 4, "a view"
        ranks = [meta(Mlp, 6, 4) for _ in range(2)]
        for rank, module in enumerate(ranks):
            model.load_into(module, slices=cached_client.shard(rank, 2, DIMS))
        assert torch.allclose(sum(module(x) for module in ranks), whole(x), atol=1e-6)


def test_what_cannot_be_divided_is_refused_by_name(attach) -> None:
    with attach(weights(Mlp(6, 9))) as model:
        with pytest.raises(
            InvalidRequestError, match=r"'up\.weight' of shape \[9, 6\] cannot be divided evenly"
        ) as caught:
            model.state_dict(slices=cached_client.shard(0, 2, {"*up.weight": 0}))
        assert caught.value.fields["tensor"] == "up.weight"
        thirds = model.state_dict(slices=cached_client.shard(2, 3, lambda info: len(info.shape) - 2))
        assert thirds["up.weight"].shape == (3, 6)
        with pytest.raises(InvalidRequestError, match="no dimension 2"):
            model.state_dict(slices=cached_client.shard(0, 2, {"*": 2}))
        no_number: Any = "0"
        with pytest.raises(InvalidRequestError, match="no dimension '0'"):
            model.state_dict(slices=cached_client.shard(0, 2, {"*": no_number}))
        no_slice: Any = (0, 1)
        with pytest.raises(InvalidRequestError, match="does not fit"):
            model.state_dict(slices={"up.weight": no_slice})
        with pytest.raises(InvalidRequestError, match="no rank 2 of 2"):
            cached_client.shard(2, 2, DIMS)
