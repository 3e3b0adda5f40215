"""``--fault-report FILE``: runs the tests that cover a row of ``tests/fault/rows.py``, and notes what became of them.

A test is a case for each set of its parameters; one that tries many things within itself says how many by the fixture
``fault_cases``, or names each exact point that it reached by ``fault_point``. What was measured on the way is told by
``fault_figure``. FILE has an entry for each test there is, by its whole name, with the commit and the date of its run;
null for one that was never run. What is not run this time keeps its entry, so that FILE can be filled in parts; what is
not there any more loses it. ``docs/generate.py`` makes a table of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fault.noted import commit_now, note
from tests.fault.rows import covering

_CASES, _POINT, _FIGURE = "fault_cases", "fault_point", "fault_figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-report",
        metavar="FILE",
        help="run only what covers a row of tests/fault/rows.py, and write what became of it to FILE",
    )
    parser.addoption(
        "--fault-list",
        metavar="FILE",
        help="with --collect-only: write the names of all that covers a row of tests/fault/rows.py to FILE",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-report")
    if path and not hasattr(config, "workerinput"):  # with xdist, the one who hears of all of them
        config.pluginmanager.register(_Report(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not (config.getoption("--fault-report") or config.getoption("--fault-list")):
        return
    chosen = [item for item in items if covering(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if not covering(item.nodeid)])
    items[:] = chosen


def pytest_collection_finish(session: pytest.Session) -> None:
    if path := session.config.getoption("--fault-list"):
        Path(path).write_text(json.dumps([item.nodeid for item in session.items]))


@pytest.fixture
def fault_cases(record_property: Callable[[str, object], None]) -> Callable[[int], None]:
    """Tells how many cases the test has tried by now; the last word counts."""
    return lambda count: record_property(_CASES, count)


@pytest.fixture
def fault_point(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Names an exact point that was reached, as the test is told to repeat it; each is a case."""
    record_property(_CASES, 0)
    return lambda point: record_property(_POINT, point)


@pytest.fixture
def fault_figure(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Notes in words what was measured where a row names a limit, beside how much else: no test judges by time."""
    return lambda figure: record_property(
        _FIGURE, f"{figure} (load average {os.getloadavg()[0]:.0f} on {os.cpu_count()} CPUs)"
    )


class _Report:
    """What became of each test, with its parameters."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._commit = commit_now()  # not of the end: who works on meanwhile commits meanwhile
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        entry = self._tests.setdefault(report.nodeid, {"cases": 0, "survived": 0, "failed": 0})
        if report.skipped:
            entry["skipped"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            return
        told = report.user_properties
        points = [str(value) for name, value in told if name == _POINT]
        cases = len(points) or int(str(dict(told).get(_CASES, 1)))
        entry["cases"] += cases
        if report.passed:
            entry["survived"] += cases
        else:
            entry["failed"] += 1
        for key, values in (("points", points), ("figures", [str(value) for name, value in told if name == _FIGURE])):
            if values:
                entry[key] = values

    def pytest_sessionfinish(self) -> None:
        note(self._path, self._tests, self._commit)
