from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.fault import noted, report
from tests.fault.noted import RESULTS, note
from tests.fault.rows import ROWS, Row, covering
from tests.integration.support import ROOT


def test_no_row_is_left_out() -> None:
    assert [row.number for row in ROWS] == list(range(1, 33))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_the_tests_of_a_row_exist(row: Row) -> None:
    for name in row.tests:
        path, _, function = name.partition("::")
        text = (ROOT / path).read_text()
        assert re.search(rf"^(async )?def {function or 'test_'}", text, re.MULTILINE), name
        assert row.number in covering(f"{name}[a-parameter]")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_noted_outcome_has_an_entry_for_each_test_there_is_and_for_no_other() -> None:
    there, known = set(noted.collected()), set(json.loads(RESULTS.read_text())["tests"])
    assert not there ^ known, f"run: make docs. New: {sorted(there - known)}; gone: {sorted(known - there)}"


def outcome(**more: object) -> dict[str, object]:
    return {"cases": 1, "survived": 1, "failed": 0, **more}


def test_a_part_that_is_run_keeps_the_rest_and_drops_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "results.json"
    monkeypatch.setattr(noted, "collected", lambda: ["t::a[1]", "t::gone"])
    note(file, {"t::a[1]": outcome(), "t::gone": outcome()}, "first")
    monkeypatch.setattr(noted, "collected", lambda: ["t::a[1]", "t::a[2]", "t::b"])
    note(file, {"t::b": outcome()}, "second+")
    told = json.loads(file.read_text())
    assert {name: entry and entry["commit"] for name, entry in told["tests"].items()} == {
        "t::a[1]": "first", "t::a[2]": None, "t::b": "second+",
    }  # fmt: skip
    assert set(told["machines"]) == {"first", "second+"}
    assert "1 at `second+`" in report._runs(told["tests"], told["machines"])
    note(file, {"t::a[1]": outcome(), "t::a[2]": outcome()}, "second+")
    told = json.loads(file.read_text())
    assert report._runs(told["tests"], told["machines"]).startswith("All of one commit, `second+`")


def test_what_was_never_run_is_named_by_its_parameters() -> None:
    row = ROWS[0]
    name = row.tests[0] + "::test_killed"
    ran = outcome(points=["fsync:1 a", "fsync:2 b"], commit="c", date="d")
    tests = {f"{name}[fsync]": ran, f"{name}[rename]": None, f"{name}[chmod]": None}
    assert "2 of 3 were never run: `test_killed` (chmod, rename)." in report._cells(row, tests)[-1]
    assert "2 distinct points" in report._cells(row, tests)[2]
