"""Where the time of a start went: the arithmetic of phases that nest, overlap, and wait for one another."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cached.types import COLD_START_PHASES
from cached_client.coldstart.breakdown import Breakdown, Row, breakdown, length
from cached_client.coldstart.spans import MAX_DEPTH, MAX_SPANS, PHASES, Span, check_labels, check_spans
from cached_client.errors import InvalidRequestError


def row(found: Breakdown, name: str) -> Row:
    (hit,) = [item for item in found.rows if item.name == name]
    return hit


def critical(found: Breakdown) -> dict[str, float]:
    return {item.name: item.critical_s for item in found.rows if item.critical_s}


def test_the_daemon_counts_the_phases_that_the_client_names():
    assert tuple(PHASES) == COLD_START_PHASES


def test_phases_one_after_another_are_all_critical_and_gaps_belong_to_none():
    found = breakdown([Span("imports", 0, 2), Span("attach", 3, 4)], 5.0)
    assert critical(found) == {"imports": 2, "attach": 1}
    assert (found.total_s, found.unaccounted_s) == (5, 2)


def test_what_runs_beside_something_longer_is_hidden():
    found = breakdown([Span("download", 0, 6), Span("imports", 0, 4), Span("load", 6, 7)])
    assert critical(found) == {"download": 6, "load": 1}
    assert (row(found, "imports").self_s, row(found, "imports").hidden_s) == (4, 4)


def test_the_one_that_ended_last_is_what_the_next_waited_for():
    found = breakdown([Span("download", 0, 4), Span("imports", 0, 6), Span("load", 6, 7)])
    assert critical(found) == {"imports": 6, "load": 1}
    assert row(found, "download").hidden_s == 4


def test_a_consumer_does_not_hide_the_download_that_it_waits_for():
    download, copy = Span("download", 1, 10), Span("weights_to_gpu", 2, 11)
    assert critical(breakdown([download, copy])) == {"download": 1, "weights_to_gpu": 9}
    found = breakdown([download, replace(copy, after="download")])
    assert critical(found) == {"download": 9, "weights_to_gpu": 1}
    assert row(found, "weights_to_gpu").hidden_s == 8


def test_parts_are_told_from_the_whole():
    found = breakdown([Span("warmup", 0, 10), Span("b1", 1, 4, parent=0), Span("b8", 5, 9, parent=0)])
    whole = row(found, "warmup")
    assert (whole.total_s, whole.self_s, whole.critical_s, whole.waited_s) == (10, 3, 3, 10)
    assert critical(found) == {"warmup": 3, "b1": 3, "b8": 4}
    assert [(item.name, item.depth) for item in found.rows] == [("warmup", 0), ("b1", 1), ("b8", 1)]


def test_phases_of_one_name_are_one_row_and_their_overlap_counts_once():
    found = breakdown([Span("download", 0, 4), Span("download", 2, 6), Span("download", 8, 9)])
    assert len(found.rows) == 1
    assert (found.rows[0].count, found.rows[0].total_s, found.rows[0].critical_s) == (3, 7, 7)
    assert found.unaccounted_s == 2


def test_a_part_that_outlasts_its_whole_makes_it_longer():
    found = breakdown([Span("load", 1, 2), Span("copy", 0, 5, parent=0)])
    assert (row(found, "load").total_s, row(found, "load").self_s, row(found, "copy").critical_s) == (5, 0, 5)


def test_while_anything_runs_no_time_is_unaccounted():
    found = breakdown([Span("a", 0, 4), Span("b", 3, 10), Span("d", 1, 5)])
    assert found.unaccounted_s == 0
    assert critical(found) == {"a": 3, "b": 7}


def test_nothing_was_recorded():
    assert breakdown([]) == Breakdown(0.0, 0.0, ())


@st.composite
def timelines(draw: st.DrawFn) -> list[Span]:
    spans: list[Span] = []
    for number in range(draw(st.integers(0, 12))):
        begin_s, end_s = sorted((draw(st.integers(0, 40)), draw(st.integers(0, 40))))
        parent = draw(st.none() | st.integers(0, number - 1)) if number else None
        spans.append(Span(draw(st.sampled_from("abcd")), begin_s, end_s, parent, draw(st.sampled_from(["", "a", "b"]))))
    return spans


@given(timelines())
def test_every_instant_belongs_to_one_phase_or_none(spans):
    found = breakdown(spans)
    assert math.isclose(found.unaccounted_s + sum(item.critical_s for item in found.rows), found.total_s)
    ends = [0.0, *sorted({time for span in spans for time in (span.start_s, span.end_s)})]
    idle = [
        (begin, end)
        for begin, end in itertools.pairwise(ends)
        if not any(span.start_s <= begin and end <= span.end_s for span in spans)
    ]
    # Parts make their wholes longer, so the whole may cover what no recorded span does; never the other way round.
    assert found.unaccounted_s <= length(idle) + 1e-9


@given(timelines())
def test_critical_is_within_self_and_self_within_total(spans):
    for item in breakdown(spans).rows:
        assert -1e-9 <= item.critical_s <= item.self_s + 1e-9 <= item.total_s + 2e-9
        assert item.total_s <= item.end_s - item.start_s + 1e-9
        assert item.waited_s <= item.total_s + 1e-9


@pytest.mark.parametrize(
    ("spans", "told"),
    [
        ([Span("Attach", 0, 1)], "'Attach' is not a phase's name"),
        ([Span("", 0, 1)], "is not a phase's name"),
        ([Span("a" * 65, 0, 1)], "is not a phase's name"),
        ([Span("a\n", 0, 1)], "is not a phase's name"),
        ([Span("a", 0, 1, after="A")], "'A' is not a phase's name"),
        ([Span("a", 2, 1)], "from 2 to 1 s"),
        ([Span("a", -1, 1)], "from -1 to 1 s"),
        ([Span("a", 0, math.inf)], "to inf s"),
        ([Span("a", math.nan, 1)], "from nan"),
        ([Span("a", 0, math.nan)], "to nan s"),
        ([Span("a", 0, 1, parent=0)], "a part of phase 0"),
        ([Span("a", 0, 1), Span("b", 0, 1, parent=5)], "a part of phase 5"),
        ([Span("a", 0, 1), Span("b", 0, 1, parent=-1)], "a part of phase -1"),
        ([Span("a", 0, 1)] * (MAX_SPANS + 1), "65 phases; at most 64"),
        ([Span("a", 0, 1, parent=index - 1 if index else None) for index in range(MAX_DEPTH + 1)], "nested deeper"),
    ],
)
def test_what_no_timeline_has_is_refused(spans, told):
    with pytest.raises(InvalidRequestError, match=told):
        check_spans(spans)


@pytest.mark.parametrize(
    "labels", [{"Engine": "x"}, {"engine": "x" * 257}, {f"l{number}": "" for number in range(17)}, {"": "x"}]
)
def test_labels_are_bounded(labels):
    with pytest.raises(InvalidRequestError):
        check_labels(labels)
