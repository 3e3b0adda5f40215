"""The simulation of a fleet: it keeps its own accounts, and what the document shows is what it finds."""

from __future__ import annotations

import json

import pytest

from bench.fleet import CASES, FILE, Case, Site, fleet_text, simulate

SITE = Site(nodes=60, model_bytes=10**11)
ALONE_S = 1e11 / (100 * 1e9 / 8)
TOGETHER_S = 60 * 1e11 / (400 * 1e9 / 8)


def found(**settings):
    return simulate(SITE, (Case("c", **settings),))[0]


def test_all_at_once_end_together_when_the_bucket_is_through():
    once = found()
    assert once.half_ready_s == pytest.approx(once.all_ready_s) == pytest.approx(TOGETHER_S)
    assert (once.most_pulling, once.demand) == (60, 15.0)


def test_slots_bound_how_many_pull_and_let_the_first_begin_to_work_early():
    bound = found(slots=4)
    assert bound.most_pulling == 4
    assert bound.half_ready_s < 0.75 * bound.all_ready_s
    assert bound.all_ready_s >= TOGETHER_S


def test_a_holder_that_dies_costs_its_slot_for_a_while_and_nobody_is_forgotten():
    dying = found(slots=4, dying=0.2)
    assert dying.most_pulling <= 4
    assert dying.all_ready_s > found(slots=4).all_ready_s


def test_a_long_jitter_keeps_the_bucket_unasked_for_most_of_the_time():
    spread = found(jitter_s=20 * TOGETHER_S)
    assert spread.most_pulling < 12
    assert spread.all_ready_s < 20 * TOGETHER_S + 2 * ALONE_S


def test_a_chain_takes_from_the_bucket_only_what_its_cache_lacks():
    chain = found(from_bucket=0.1, near_gbit_per_s=45)
    assert chain.bucket_bytes == pytest.approx(6e11)
    assert chain.all_ready_s == pytest.approx(max(0.1 * TOGETHER_S, 0.9 * 1e11 / (45 * 1e9 / 8)))


def test_a_request_limit_binds_where_it_is_lower_than_the_bandwidth():
    assert Site(get_per_s=100).bucket_bytes_per_s == 100 * 16 * 2**20


def test_the_documents_figures_are_those_that_the_simulation_finds():
    kept = {row["title"]: row for row in json.loads(FILE.read_text())["found"]}
    assert list(kept) == [case.title for case in CASES]
    quick = tuple(case for case in CASES if not case.slots)
    for item in simulate(Site(), quick):
        assert kept[item.title]["all_ready_s"] == pytest.approx(item.all_ready_s)
        assert kept[item.title]["most_pulling"] == item.most_pulling
    assert all(case.title in fleet_text() for case in CASES)
