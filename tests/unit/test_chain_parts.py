"""The parts of chains that know values only: the breaker, a chain as text, a chain in the catalog."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cached.catalog_file import CatalogLink, CatalogModel, parse_catalog
from cached.errors import ConfigError, InvalidRequestError
from cached.origins.base import OriginSpec
from cached.refs import check_source, parse_ref, uris_of
from cached.transfer.breaker import Breaker


def test_three_failures_in_a_row_begin_a_pause_and_a_success_forgets_them() -> None:
    breaker = Breaker()
    assert [breaker.failed(1.0, "refused") for _ in range(2)] == [False, False]
    assert not breaker.succeeded()
    assert [breaker.failed(2.0, "refused") for _ in range(3)] == [False, False, True]
    assert not breaker.take(2.1)
    assert 3.0 < breaker.left_s(2.0) < 7.0
    assert breaker.cause == "refused"


def test_after_the_pause_one_request_tries_it() -> None:
    breaker = Breaker()
    assert breaker.failed(0.0, "denied", at_once=True)
    later_s = breaker.left_s(0.0) + 0.1
    assert breaker.take(later_s)
    assert not breaker.take(later_s), "the others go elsewhere meanwhile"
    breaker.gave_up()
    assert breaker.take(later_s)
    assert breaker.succeeded()
    assert all(breaker.take(later_s) for _ in range(3))


def test_pauses_grow_to_a_bound_and_late_failures_do_not_count() -> None:
    breaker, now_s, pauses_s = Breaker(), 0.0, []
    breaker.failed(now_s, "down", at_once=True)
    for _ in range(12):
        pauses_s.append(breaker.left_s(now_s))
        breaker.failed(now_s, "asked before the pause began")
        assert breaker.left_s(now_s) == pauses_s[-1]
        now_s += pauses_s[-1]
        assert breaker.take(now_s)
        breaker.failed(now_s, "still down")
    assert pauses_s[1] > pauses_s[0]
    assert max(pauses_s) <= 375.0
    assert pauses_s[-1] >= 225.0


@pytest.mark.parametrize(
    ("text", "uris"),
    [
        ("s3://a/b", ("s3://a/b",)),
        (" s3://a/b  https://c/d ", ("s3://a/b", "https://c/d")),
        ("s3://bucket/with blanks/x file:///y", ("s3://bucket/with blanks/x", "file:///y")),
    ],
)
def test_a_chain_as_text(text: str, uris: tuple[str, ...]) -> None:
    assert uris_of(text) == uris


def test_a_reference_that_is_a_uri_has_no_other_source() -> None:
    uri = parse_ref("s3://far/m")
    for source in ("", "s3://far/m", "file:///near/m s3://far/m"):
        check_source(uri, source)
    check_source(parse_ref("m"), "s3://far/m")
    for source in ("s3://other/m", "s3://far/m file:///near/m"):
        with pytest.raises(InvalidRequestError, match="two sources are given: s3://far/m and") as error:
            check_source(uri, source)
        assert "or a name and the source" in error.value.hint


def test_a_specs_links_end_with_itself() -> None:
    near = OriginSpec("s3://near/m")
    chain = OriginSpec("s3://far/m", {"region": "x"}, (near,))
    assert chain.links == (near, OriginSpec("s3://far/m", {"region": "x"}))
    assert near.alone is near


def read(entry: dict[str, Any]) -> CatalogModel:
    return parse_catalog(json.dumps({"models": {"m": entry}}), "json", "catalog").models["m"]


def test_origins_of_the_catalog_are_a_chain_whose_last_link_is_the_source() -> None:
    near = {"source": "s3://b/m", "origin": {"endpoint_url": "http://localhost:9000", "anonymous": True}}
    model = read({"origins": [near, "s3://b/m"]})
    assert (model.source, model.origin) == ("s3://b/m", {})
    assert model.front == (CatalogLink("s3://b/m", {"endpoint_url": "http://localhost:9000", "anonymous": "true"}),)
    assert read({"origins": ["s3://b/m"]}).front == ()


@pytest.mark.parametrize(
    ("entry", "key", "wrong"),
    [
        ({"origins": ["s3://b/m"], "source": "s3://b/m"}, "models.m.source", "stands beside origins"),
        ({"origins": ["s3://b/m"], "origin": {}}, "models.m.origin", "stands beside origins"),
        ({"origins": []}, "models.m.origins", "is not a chain"),
        ({"origins": "s3://b/m"}, "models.m.origins", "is not a chain"),
        ({"origins": ["s3://b/m", 7]}, "models.m.origins[1]", "is no link"),
        ({"origins": ["s3://b/m", "s3://b/m"]}, "models.m.origins", "names a link twice"),
        ({"origins": ["ftp://b/m"]}, "models.m.origins[0]", "no origin serves ftp://"),
        ({"origins": [{"source": "s3://b/m", "endpoint": "x"}]}, "models.m.origins[0].endpoint", "no such key"),
        ({"origins": [{"source": "s3://b/m", "origin": {"x": "y"}}]}, "models.m.origins[0].origin.x", "no such key"),
    ],
)
def test_chains_that_cannot_be_used_are_told_by_their_keys(entry: dict[str, Any], key: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(entry)
    assert key in caught.value.message
    assert wrong in caught.value.message
