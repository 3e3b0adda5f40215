"""The parts of chains: the breaker, a chain as text and in the catalog, and when the next link is asked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cached.catalog_file import CatalogLink, CatalogModel, parse_catalog
from cached.clock import SystemClock
from cached.errors import CachedError, ConfigError, InvalidRequestError, MoverError
from cached.levels.base import FileRef
from cached.origins.base import OriginObject, OriginSpec
from cached.refs import check_source, parse_ref, uris_of
from cached.transfer.breaker import Breaker
from cached.transfer.chain import Chains
from cached.transfer.fill import OriginSource
from cached.transfer.jobs import Fetch, Job, Listing, Moved, Result, StatObjects


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


# Which link serves. A runner stands for movers and origins.

_NEAR, _ITEM = OriginSpec("s3://near/x"), OriginObject("w", 10, "v")
_CHAIN = OriginSpec("s3://far/x", {}, (_NEAR,))
_UNFORESEEN = MoverError("Fetch failed in a mover", raised="ValueError")
_DEATH = MoverError("Fetch was lost: a mover died", attempts=3)


class Movers:
    """Of the place in front a job ends with ``near``; of the other one it is done. Also told what happens."""

    def __init__(self, near: CachedError | int, *, stat_fails: bool = False) -> None:
        self.near = near
        self.stat_fails = stat_fails
        self.asked: list[str] = []

    async def run(self, job: Job, *, key: str | None = None, priority: int = 0) -> Result:
        assert isinstance(job, Fetch | StatObjects)
        self.asked.append(job.origin.uri)
        if isinstance(job, StatObjects) and not self.stat_fails:
            return Listing((_ITEM,))
        if isinstance(self.near, CachedError) and job.origin == _NEAR:
            raise self.near
        return Moved(self.near if isinstance(self.near, int) and job.origin == _NEAR else 2, 10, 0.1, 0.1)

    def emit(self, *_args: object, **_fields: object) -> None:
        pass


def chains_on(movers: Movers, counted: list[tuple[str, str]]) -> Chains:
    def count(origin: str, reason: str) -> None:
        counted.append((origin, reason))

    runner: Any = movers
    return Chains(runner, SystemClock(), on_failover=count, events=movers, report=lambda *_args, **_fields: None)


def a_fetch() -> Fetch:
    return Fetch(_CHAIN, _ITEM, 0, 10, FileRef("/x", 1, 10, True), expected_crc64=2)


def test_wrong_bytes_are_one_failover() -> None:
    counted: list[tuple[str, str]] = []
    moved = asyncio.run(chains_on(Movers(1), counted).run(a_fetch()))
    assert isinstance(moved, Moved)
    assert moved.origin == "s3://far"
    assert counted == [("s3://near", "INTEGRITY")]


@pytest.mark.parametrize("stat_fails", [False, True])
def test_after_an_exception_that_nobody_foresaw_the_next_link_is_asked(stat_fails: bool) -> None:
    counted: list[tuple[str, str]] = []
    movers = Movers(_UNFORESEEN, stat_fails=stat_fails)
    chains = chains_on(movers, counted)
    for _ in range(4):
        moved = asyncio.run(chains.run(a_fetch()))
        assert isinstance(moved, Moved)
        assert moved.origin == "s3://far"
    assert counted == [("s3://near", "MOVER_FAILED")] * 3
    assert list(chains.skipped()) == ["s3://near"]


def test_the_death_of_a_mover_is_the_pools_to_mend() -> None:
    movers = Movers(_DEATH)
    chains = chains_on(movers, [])
    with pytest.raises(MoverError, match="lost"):
        asyncio.run(chains.run(a_fetch()))
    assert "s3://far/x" not in movers.asked
    assert not chains.skipped()


@pytest.mark.parametrize(("error", "elsewhere"), [(_UNFORESEEN, True), (_DEATH, False)])
def test_where_all_of_an_object_comes_from_one_place(error: MoverError, elsewhere: bool) -> None:
    chain = OriginSource(_CHAIN, _ITEM)
    front = asyncio.run(chains_on(Movers(2), []).standing_in(chain))
    assert front.spec == _NEAR
    assert chains_on(Movers(2), []).blame(front, error) == elsewhere
    chains = chains_on(Movers(error, stat_fails=True), [])
    if elsewhere:
        assert asyncio.run(chains.standing_in(chain)).spec == _CHAIN.alone
        return
    with pytest.raises(MoverError, match="lost"):
        asyncio.run(chains.standing_in(chain))
