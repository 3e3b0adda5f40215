"""Arithmetic of results, their JSON, and the tables that are made of them."""

from __future__ import annotations

import json

import pytest

from bench.contest import hold, rotated
from bench.headline import headline_text
from bench.results import (
    Contest,
    FigureTable,
    PartResult,
    Requirement,
    Role,
    Sample,
    Standing,
    Unavailable,
    merged,
    read_part,
)
from bench.tables import part_text, required_text


def standing(name, *seconds, role=Role.PEER, cpu_s=1.0, **more):
    return Standing(name, f"the {name}", role, samples=[Sample(s, 2_000_000_000, cpu_s, **more) for s in seconds])


def contest():
    ours = standing("ours", 1.0, 4.0, 2.0, role=Role.OURS, later_cpu_s=3.0, server_cpu_s=0.5, extra={"first s": 0.2})
    absent = Standing("absent", "the absent", Role.PEER, reason="no such library")
    limits = [standing("slow limit", 2.0, role=Role.LIMIT), standing("limit", 0.5, role=Role.LIMIT)]
    return Contest("race", "A race", [ours, standing("peer", 8.0, cpu_s=6.0), absent, *limits], 2_000_000_000)


def test_rates_are_medians_with_their_spread():
    rate = contest().standings[0].over("gb_per_s")
    assert (rate.median, rate.least, rate.most) == (1.0, 0.5, 2.0)


def test_processor_time_is_told_for_each_gb_until_ready_and_in_all():
    ours = contest().standings[0]
    assert ours.median("cpu_s_per_gb") == 0.5
    assert ours.median("total_cpu_s_per_gb") == 2.0
    assert ours.median("server_cpu_s_per_gb") == 0.25
    assert ours.median("first s") == 0.2


def test_ratios_are_of_medians_and_none_where_one_is_missing():
    race = contest()
    assert race.ratio("ours", "peer") == 4.0
    assert race.ratio("ours", "peer", "cpu_s_per_gb") == pytest.approx(1 / 6)
    assert race.ratio("ours", "absent") is None
    assert race.ratio("nobody", "ours") is None
    assert race.best(Role.LIMIT) is race.get("limit")


@pytest.mark.parametrize(
    ("figure", "at_least", "reached"),
    [(2.0, True, True), (1.9, True, False), (2.0, False, True), (2.1, False, False), (None, True, None)],
)
def test_a_requirement_is_reached_missed_or_was_not_measured(figure, at_least, reached):
    assert Requirement("it", figure, 2.0, at_least).reached is reached


def result():
    table = FigureTable("t", "A table", ["what", "ms"], [["list", 0.0123], ["attach", None]], "note")
    needed = [Requirement("fast | enough", 4.0, 2.0, unit="×"), Requirement("small", None, 3.0, at_least=False)]
    hardware = {"cpu": "some", "cores": 2, "memory_bytes": 1 << 30, "versions": {"torch": "2"}}
    return PartResult("part", "A part", [contest()], [table], needed, hardware, {"rounds": 3})


def test_json_is_read_back_as_it_was_written(tmp_path):
    path = result().write(tmp_path)
    assert read_part(path) == result()
    assert [item.name for item in tmp_path.iterdir()] == ["part.json"]


def test_json_of_another_schema_is_refused(tmp_path):
    path = result().write(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 0}))
    with pytest.raises(ValueError, match="another version"):
        read_part(path)


def test_tables_hold_every_contestant_with_its_ratios_or_its_reason(tmp_path):
    result().write(tmp_path)
    lines = part_text("part", tmp_path).splitlines()
    heads = next(line for line in lines if line.startswith("| contestant"))
    assert heads.endswith("| of the limit | of ours | first s |")
    assert "| the ours | 1.00 | 0.50–2.00 | 0.50 | 2.00 | 0.25 | 0.25 | 1.00 | 0.20 |" in lines
    assert "| the peer | 0.25 | 0.25–0.25 | 3.00 | 3.00 | – | 0.06 | 0.25 | – |".replace("0.06", "0.062") in lines
    assert "- the absent: not measured: no such library" in lines
    assert "| list | 0.012 |" in lines
    assert "| attach | – |" in lines
    for line in lines:
        assert line.count("|") in {0, 3, 10}, line


def test_requirements_of_all_parts_come_together(tmp_path):
    result().write(tmp_path)
    lines = required_text(tmp_path).splitlines()
    assert "| part | fast \\| enough | 4.00 × | ≥ 2.00 × | yes |" in lines
    assert "| part | small | – | ≤ 3.00 | not measured |" in lines


def test_the_headline_names_ours_the_best_peer_and_the_best_limit(tmp_path):
    assert headline_text(tmp_path) == "Nothing was measured yet."
    race = contest()
    race.standings[0].name = "cached-crc"
    PartResult("s3", "S3", contests=[race], hardware={"cores": 2, "cpu": "some"}).write(tmp_path)
    _heads, _rule, row, _empty, where = headline_text(tmp_path).splitlines()
    told = [
        "A race, 2.0 GB",
        "1.00 GB/s, 0.50 CPU-s/GB",
        "the peer: 0.25 GB/s, 3.00 CPU-s/GB",
        "4.00 GB/s, 0.50 CPU-s/GB",
    ]
    assert [cell.strip() for cell in row.strip("|").split("|")] == told
    assert where.endswith("Nothing was measured on a GPU.")


def test_what_was_never_measured_says_how_to(tmp_path):
    assert part_text("part", tmp_path) == "Not measured yet: `make bench BENCH_ARGS=part`."
    PartResult("part", "A part", unavailable="there is no GPU here").write(tmp_path)
    assert part_text("part", tmp_path) == "Not measured: there is no GPU here."


def test_what_was_not_measured_again_stays():
    old, new = result(), result()
    old.contests.append(Contest("other", "Another", []))
    new.contests[0].when = "today"
    new.requirements = [Requirement("small", 2.0, 3.0, at_least=False)]
    old.tables = [FigureTable("times", "Times", ["of", "s"], [["race", 9], ["other", 2]])]
    new.tables = [FigureTable("times", "Times", ["of", "s"], [["race", 8]])]
    both = merged(old, new)
    assert [table.rows for table in both.tables] == [[["race", 8], ["other", 2]]]
    assert [(item.name, item.when) for item in both.contests] == [("race", "today"), ("other", "")]
    assert [(item.text, item.figure) for item in both.requirements] == [("fast | enough", 4.0), ("small", 2.0)]


class Runner:
    """A contestant that does what it is told."""

    role, version = Role.PEER, "runner 1"

    def __init__(self, name, log, *, fails_at=None, missing=False):
        self.name = self.title = name
        self.log, self.fails_at, self.missing, self.runs = log, fails_at, missing, 0

    def prepare(self):
        if self.missing:
            raise Unavailable("not there")
        self.log.append(f"prepare {self.name}")

    def run(self):
        self.runs += 1
        if self.runs == self.fails_at:
            raise RuntimeError("fell over")
        self.log.append(f"run {self.name}")
        return Sample(1.0, 1000, 0.0)

    def close(self):
        self.log.append(f"close {self.name}")


def test_contestants_take_turns_in_an_order_that_rotates():
    log: list[str] = []
    held = hold(Contest("c", "C", []), [Runner("a", log), Runner("b", log)], rounds=2, memory_bytes=1 << 20)
    turns = [f"{step} {name}" for name in "abba" for step in ("prepare", "run")]
    assert log == [*turns, "close a", "close b"]
    assert [(item.name, len(item.samples), item.version) for item in held.standings] == [
        ("a", 2, "runner 1"), ("b", 2, "runner 1"),
    ]  # fmt: skip
    assert list(rotated([1, 2, 3], 4)) == [2, 3, 1]


def test_one_that_fails_is_out_with_its_reason_and_the_others_go_on():
    log: list[str] = []
    runners = [Runner("a", log, fails_at=2), Runner("b", log), Runner("c", log, missing=True)]
    told = []
    held = hold(
        Contest("c", "C", []), runners, rounds=3, memory_bytes=0, report=lambda n, item: told.append((n, item.name))
    )
    a, b, c = held.standings
    assert (len(a.samples), a.reason, a.failed) == (1, "RuntimeError: fell over", True)
    assert (len(b.samples), b.reason) == (3, "")
    assert (c.measured, c.reason, c.failed) == (False, "not there", False)
    assert log[-3:] == ["close a", "close b", "close c"]
    assert told == [(0, "a"), (0, "b"), (0, "c"), (1, "b"), (1, "a"), (2, "b")]
