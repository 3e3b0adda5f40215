"""The simulator against results that were computed by hand: hops of 1 s + 10 B/s and 3 s + 2 B/s."""

from __future__ import annotations

import random
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cached.errors import InvalidRequestError
from cached.policy import Hop
from cached.simulate import POLICIES, Outcome, Row, Setup, read_trace, simulate
from cached.simulate.setup import Standing
from cached.simulate.tiers import read_tiers
from cached.types import Tier

SETUP = Setup(l1_bytes=20, l2_bytes=40, from_l2=Hop(1.0, 10.0), from_l3=Hop(3.0, 2.0))
L2_S, L3_S = 2.0, 8.0  # for 10 bytes


def rows(models: str, size: int = 10, every_s: float = 60.0, lease_s: float = 0.0) -> list[Row]:
    """One attach for each letter."""
    return [Row(index * every_s, model, size, lease_s) for index, model in enumerate(models)]


def test_lru_by_hand() -> None:
    """L1 holds 2, L2 4. a b c: from L3; a went from L1, so it comes from L2; c is still in L1."""
    outcome = simulate(SETUP, rows("abcac"), "lru")
    assert outcome == Outcome(
        attaches=5, l1_hits=1, l2_hits=1, cold_start_s=3 * L3_S + L2_S, cold_start_share=26 / 40, mean_s=26 / 5,
        p90_s=L3_S, p99_s=L3_S, l3_bytes=30, l2_bytes=10, evictions=2,
    )  # fmt: skip


def test_lru_in_l2_goes_by_misses_of_l1() -> None:
    """L2 holds 4: e throws out a, though a was hit in L1 meanwhile; so b (then gone from L1) is still in L2."""
    setup = replace(SETUP, l1_bytes=50)
    outcome = simulate(setup, rows("abcdae"), "lru")
    assert (outcome.l1_hits, outcome.l2_hits, outcome.evictions) == (1, 0, 1)
    thrashed = simulate(replace(SETUP, l1_bytes=10), rows("abcdaea"), "lru")
    assert (thrashed.l1_hits, thrashed.l2_hits) == (0, 2)  # a's second attach was a use of L2, so b went for e


def test_what_is_larger_than_a_level_passes_by() -> None:
    for policy in ("default", "lru", "gdsf"):
        outcome = simulate(SETUP, rows("aa", size=30), policy)
        assert (outcome.l1_hits, outcome.l2_hits, outcome.evictions) == (0, 1, 0), policy
        outcome = simulate(SETUP, rows("aa", size=50), policy)
        assert (outcome.l1_hits, outcome.l2_hits, outcome.l3_bytes) == (0, 0, 100), policy


def test_gdsf_by_hand() -> None:
    """Of equal cost and size, the one used twice stays: c goes for b's place, so the second b comes from L2."""
    outcome = simulate(SETUP, rows("aabcab"), "gdsf")
    assert (outcome.l1_hits, outcome.l2_hits, outcome.evictions) == (2, 1, 2)


def test_gdsf_ages() -> None:
    """What was used often long ago goes once the level has aged past it."""
    setup = replace(SETUP, l1_bytes=10, l2_bytes=0)
    assert simulate(setup, rows("aaab"), "gdsf").l1_hits == 2
    assert simulate(setup, rows("aaabb"), "gdsf").l1_hits == 3


def test_the_daemons_policy_does_not_let_a_scan_through() -> None:
    """a and b are asked for again and again; each of 20 others once: they never displace them."""
    trace = rows("abababab" + "cdefghijklmnopqrstuv" + "ab")
    outcome = simulate(SETUP, trace, "default")
    assert outcome.l1_hits == 8
    assert simulate(SETUP, trace, "lru").l1_hits == 6


def test_the_daemons_policy_lets_in_who_becomes_popular() -> None:
    trace = rows("abababab" + "c" * 40)
    outcome = simulate(SETUP, trace, "default")
    assert outcome.l1_hits is not None
    assert outcome.l1_hits >= 6 + 30


def test_leases_protect_and_keep_transient_segments() -> None:
    """a and b fill L1 under leases, so c is transient: there while it is leased, gone afterwards."""
    held = [Row(0.0, "a", 10, 1000.0), Row(1.0, "b", 10, 1000.0), Row(2.0, "c", 10, 50.0)]
    again = [Row(30.0, "c", 10), Row(60.0, "c", 10), Row(70.0, "a", 10)]
    for policy in ("default", "lru", "gdsf"):
        outcome = simulate(SETUP, [*held, *again], policy)
        assert (outcome.l1_hits, outcome.l2_hits, outcome.evictions) == (2, 1, 0), policy


def test_a_new_lease_prolongs_a_transient_segment() -> None:
    held = [Row(0.0, "a", 20, 1000.0), Row(2.0, "c", 10, 50.0), Row(40.0, "c", 10, 100.0), Row(90.0, "c", 10)]
    assert simulate(SETUP, held, "default").l1_hits == 2


def test_other_content_is_loaded_anew() -> None:
    trace = [Row(0.0, "a", 10), Row(1.0, "a", 12), Row(2.0, "a", 12)]
    for policy in ("default", "lru", "gdsf"):
        outcome = simulate(SETUP, trace, policy)
        assert (outcome.l1_hits, outcome.l3_bytes, outcome.evictions) == (1, 22, 0), policy


def test_preloaded_models_come_from_l2_and_nothing_else_ever_does() -> None:
    setup = replace(SETUP, l1_bytes=0, preloaded=1.0)
    for policy in ("default", "lru", "gdsf"):
        outcome = simulate(setup, rows("abab"), policy)
        assert (outcome.l2_hits, outcome.cold_start_s, outcome.cold_start_share) == (4, 8.0, 1.0), policy
        none = simulate(replace(setup, preloaded=0.0), rows("abab"), policy)
        assert (none.l2_hits, none.cold_start_s) == (0, 32.0), policy


def test_the_preloaded_are_always_the_same_and_as_many_as_was_said() -> None:
    names = [f"model-{number}" for number in range(2000)]
    some = replace(SETUP, preloaded=0.6).preloaded_of(names)
    assert some == replace(SETUP, preloaded=0.6).preloaded_of(reversed(names))
    assert 0.56 < len(some) / len(names) < 0.64
    assert some < replace(SETUP, preloaded=0.8).preloaded_of(names)


def test_percentiles_are_by_nearest_rank_over_all_attaches() -> None:
    outcome = simulate(replace(SETUP, l1_bytes=100, l2_bytes=100), rows("a" * 19 + "b"), "lru")
    assert (outcome.p90_s, outcome.p99_s, outcome.mean_s) == (0.0, L3_S, 2 * L3_S / 20)


def test_hot_models_are_there_from_the_start_and_never_go() -> None:
    setup = replace(SETUP, l1_bytes=10, standings={"h": Standing(Tier.HOT), "absent": Standing(Tier.HOT)})
    outcome = simulate(setup, rows("abcabch"), "default")
    assert (outcome.l1_hits, outcome.l3_bytes) == (1, 40)
    assert outcome.l2_hits == 3
    with pytest.raises(InvalidRequestError, match="the hot models take 10 B, L1 has 9 B"):
        simulate(replace(setup, l1_bytes=9), rows("h"), "default")
    assert simulate(setup, rows("abch"), "lru").l1_hits == 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="no policy 'best'"):
        simulate(SETUP, rows("a"), "best")


# The bound.


def test_the_bound_of_one_model_is_its_first_load() -> None:
    outcome = simulate(SETUP, rows("aaaa"), "bound")
    assert outcome.cold_start_s == pytest.approx(L3_S)
    assert [item.name for item in fields(outcome) if getattr(outcome, item.name) is None] == [
        "l1_hits", "l2_hits", "p90_s", "p99_s", "l3_bytes", "l2_bytes", "evictions",
    ]  # fmt: skip


def test_the_bound_by_hand() -> None:
    """L1 holds one of a and b, no L2: of abababab, one of them is hit three times at best, the other never."""
    setup = replace(SETUP, l1_bytes=10, l2_bytes=0)
    assert simulate(setup, rows("abababab"), "bound").cold_start_s == pytest.approx(5 * L3_S, abs=0.5)
    with_l2 = replace(setup, l2_bytes=20)
    assert simulate(with_l2, rows("abababab"), "bound").cold_start_s == pytest.approx(2 * L3_S + 3 * L2_S, abs=0.5)
    without = replace(setup, l1_bytes=9)
    assert simulate(without, rows("abababab"), "bound").cold_start_s == pytest.approx(8 * L3_S)


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_better_than_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    sizes = {name: rng.randint(1, 15) for name in "abcdefgh"}
    names = [rng.choice("aaabbcdefgh") for _ in range(120)]
    trace = [Row(index * 100.0, name, sizes[name]) for index, name in enumerate(names)]
    for setup in (SETUP, replace(SETUP, preloaded=0.5), replace(SETUP, l2_bytes=5)):
        bound = simulate(setup, trace, "bound").cold_start_s
        assert bound > 0
        for policy in set(POLICIES) - {"bound"}:
            assert simulate(setup, trace, policy).cold_start_s >= bound - 1e-6, policy


# Traces.


def read(tmp_path: Path, text: str) -> list[Row]:
    path = tmp_path / "trace.csv"
    path.write_text(text, encoding="utf-8")
    return read_trace(path)


def test_rows_are_read_and_put_in_order_of_time(tmp_path: Path) -> None:
    text = "model,time_s,size_bytes,lease_s,note\nb,2.5,10,,x\n a ,1e0,20,3,y\n"
    assert read(tmp_path, text) == [Row(1.0, "a", 20, 3.0), Row(2.5, "b", 10)]
    assert read(tmp_path, "\ufefftime_s,model,size_bytes\n-1,a,20\n") == [Row(-1.0, "a", 20)]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", ":1: the header has no column time_s, model, size_bytes"),
        ("time_s,model\n1,a\n", ":1: the header has no column size_bytes"),
        ("time_s,model,size_bytes,model\n1,a,2,b\n", ":1: the header has the column model twice"),
        ("time_s,model,size_bytes\n", ":2: there are no rows"),
        ("time_s,model,size_bytes\n1,a,2\nx,a,2\n", ":3: time_s 'x' is not a number"),
        ("time_s,model,size_bytes\nnan,a,2\n", ":2: time_s 'nan' is not a finite number"),
        ("time_s,model,size_bytes\n1,,2\n", ":2: model is missing"),
        ("time_s,model,size_bytes\n1,a\x1b,2\n", ":2: model 'a\\x1b' is not printable"),
        ("time_s,model,size_bytes\n1,a\n", ":2: size_bytes is missing"),
        ("time_s,model,size_bytes\n1,a,0\n", ":2: size_bytes '0' is not a whole number of bytes above 0"),
        ("time_s,model,size_bytes\n1,a,-5\n", ":2: size_bytes '-5' is not a whole number"),
        ("time_s,model,size_bytes\n1,a,1.5\n", ":2: size_bytes '1.5' is not a whole number"),
        ("time_s,model,size_bytes\n1,a,5GB\n", ":2: size_bytes '5GB' is not a number"),
        ("time_s,model,size_bytes\n1,a,5,9\n", ":2: there are more fields than columns"),
        ("time_s,model,size_bytes,lease_s\n1,a,5,-9\n", ":2: lease_s -9 is negative"),
        ("time_s,model,size_bytes,lease_s\n1,a,5,inf\n", ":2: lease_s 'inf' is not a finite number"),
    ],
)
def test_bad_rows_are_refused_with_file_line_and_what_is_wrong(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(tmp_path, text)
    assert caught.value.message.startswith(f"{tmp_path / 'trace.csv'}{what}")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_trace(tmp_path / "binary.csv")


# Tiers.


def test_tiers_are_read_from_a_catalog_or_a_plain_table(tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.json"
    catalog.write_text(
        '{"models": {"a": {"source": "s3://b/a", "tier": "hot", "priority": 3, "pinned": true}, "b": {}}}'
    )
    assert read_tiers(catalog) == {"a": Standing(Tier.HOT, 3, True), "b": Standing()}
    plain = tmp_path / "plain.toml"
    plain.write_text('a = "cold"\n')
    assert read_tiers(plain) == {"a": Standing(Tier.COLD)}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[", "cannot be read"),
        ("[1]", "has no table of models"),
        ('{"a": "icy"}', "a: tier 'icy' is not one of hot, warm, cold, auto"),
        ('{"a": 5}', "a: 5 is neither a tier nor a table"),
        ('{"a": {"priority": true}}', "a: priority True is not a whole number"),
        ('{"a": {"priority": -1}}', "a: priority -1 is not a whole number"),
        ('{"a": {"pinned": 1}}', "a: pinned 1 is neither true nor false"),
    ],
)
def test_tiers_that_are_wrong_are_refused(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "tiers.json"
    path.write_text(text)
    with pytest.raises(InvalidRequestError) as caught:
        read_tiers(path)
    assert what in caught.value.message
