"""What a model has from others: an adapter from its base, a model from its hot windows."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import pytest

from cached.cache.registry import Registry
from cached.catalog_file import parse_catalog
from cached.index import Index
from cached.level import Level
from cached.refs import Ref
from cached.types import Tier


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(Index(tmp_path / "index"), lambda _: None, time_zone="Asia/Tokyo")
    yield made
    asyncio.run(made.close())


def say(registry: Registry, tenants: dict[str, Any] | None = None, **models: dict[str, Any]) -> None:
    entries = {name: {"source": f"s3://b/{name}"} | entry for name, entry in models.items()}
    registry.set_catalog(parse_catalog(json.dumps({"models": entries, "tenants": tenants or {}}), "json", "c"))


def test_the_strongest_of_operator_catalog_and_schedule_counts(registry: Registry) -> None:
    say(registry, m={"tier": "cold", "hot": ["08:00-20:00"]})
    model = registry.models["m"]
    assert model.tier == (Tier.COLD, "catalog")
    registry.update(model, operator_tier=Tier.WARM)
    assert model.tier == (Tier.WARM, "operator")
    registry.set_in_window(model, True)
    assert model.tier == (Tier.HOT, "schedule")
    registry.update(model, operator_tier=Tier.HOT)
    assert model.tier == (Tier.HOT, "operator")


def test_windows_without_a_zone_are_in_the_one_of_the_settings(registry: Registry) -> None:
    say(registry, m={"hot": ["08:00-09:00", "10:00-11:00 UTC"]})
    assert [window.zone for window in registry.models["m"].schedule.windows] == ["Asia/Tokyo", "UTC"]
    say(registry, m={})
    assert registry.models["m"].schedule.windows == ()


@pytest.mark.parametrize(
    ("base", "own", "tier"),
    [
        ({"tier": "cold"}, {}, (Tier.COLD, "base")),
        ({"tier": "warm"}, {}, (Tier.WARM, "base")),
        ({"tier": "hot"}, {}, (Tier.WARM, "base")),
        ({}, {}, (Tier.AUTO, "base")),
        ({"tier": "hot"}, {"tier": "cold"}, (Tier.COLD, "catalog")),
        ({"tier": "cold"}, {"tier": "hot"}, (Tier.HOT, "catalog")),
    ],
)
def test_an_adapter_has_the_tier_of_its_base_if_it_has_none_of_its_own(registry: Registry, base, own, tier) -> None:
    say(registry, big=base, lora={"base": "big", **own})
    assert registry.models["lora"].tier == tier


def test_an_adapter_has_priority_and_tenant_of_its_base(registry: Registry) -> None:
    say(
        registry, {"red": {"l1": "50%"}, "blue": {}}, big={"priority": 7, "tenant": "red"}, lora={"base": "big"},
        own={"base": "big", "priority": 2, "tenant": "blue"}, other={},
    )  # fmt: skip
    lora, own, other = registry.models["lora"], registry.models["own"], registry.models["other"]
    assert (lora.base, lora.priority, lora.tenant) == ("big", 7, "red")
    assert (own.base, own.priority, own.tenant) == ("big", 2, "blue")
    assert (other.base, other.priority, other.tenant) == ("", 0, "")
    assert {name: dict(bounds) for name, bounds in registry.tenants.items()} == {"red": {Level.L1: "50%"}, "blue": {}}


def test_an_adapter_is_kept_with_its_base(registry: Registry) -> None:
    say(registry, big={}, lora={"base": "big"})
    big, lora = registry.models["big"], registry.models["lora"]
    assert lora.keep_until_s == -inf
    lora.kept_until_s = 50.0
    assert (lora.keep_until_s, big.keep_until_s) == (50.0, -inf)
    big.kept_until_s = 100.0
    assert (lora.keep_until_s, big.keep_until_s) == (100.0, 100.0)
    big.lease_count = 1
    assert (lora.keep_until_s, big.keep_until_s) == (inf, 100.0)
    big.lease_count = 0
    assert lora.keep_until_s == 100.0
    registry.update(big, pinned=True)
    assert lora.keep_until_s == inf
    registry.update(big, pinned=False, operator_tier=Tier.HOT)
    assert lora.keep_until_s == inf


def test_a_base_may_come_and_go(registry: Registry) -> None:
    say(registry, lora={"base": "big", "source": "s3://b/lora"})
    lora = registry.models["lora"]
    assert (lora.base, lora.base_model) == ("big", None)
    assert lora.tier == (Tier.AUTO, "default")
    big = registry.known("big")
    assert lora.base_model is big
    registry.forget_model(big)
    assert lora.base_model is None
    big = registry.known("big")
    registry.forget_if_unknown(big)
    assert lora.base_model is None
    say(registry, big={"tier": "cold"}, lora={"base": "big"})
    assert lora.tier == (Tier.COLD, "base")
    registry.forget_model(registry.require(Ref("big")))  # what the catalog says stays known
    assert registry.models["lora"].base_model is registry.models["big"]
    say(registry, big={"tier": "cold"}, lora={})
    assert (lora.base, lora.base_model, lora.tier) == ("", None, (Tier.AUTO, "default"))


def test_an_adapter_that_is_forgotten_and_known_again_has_its_base(registry: Registry) -> None:
    say(registry, big={"tier": "cold"}, lora={"base": "big"})
    registry.forget_model(registry.models["lora"])
    assert registry.models["lora"].tier == (Tier.COLD, "base")
