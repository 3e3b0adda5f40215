"""``--fault-report FILE``: runs the tests that cover a row of ``tests/fault/rows.py``, and notes what became of them.

A test is a case for each set of its parameters; one that tries many things within itself says how many by the fixture
``fault_cases``, or names each exact point that it reached by ``fault_point``. What was measured on the way is told by
``fault_figure``. What FILE says of tests that were not run this time stays, so that it can be filled in parts, one set
of parameters at a time if need be. ``docs/generate.py`` makes a table of it.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.fault.rows import covering

_CASES, _POINT, _FIGURE = "fault_cases", "fault_point", "fault_figure"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-report",
        metavar="FILE",
        help="run only what covers a row of tests/fault/rows.py, and write what became of it to FILE",
    )


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--fault-report")
    if path and not hasattr(config, "workerinput"):  # with xdist, the one who hears of all of them
        config.pluginmanager.register(_Report(Path(path)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--fault-report"):
        return
    chosen = [item for item in items if covering(item.nodeid)]
    config.hook.pytest_deselected(items=[item for item in items if not covering(item.nodeid)])
    items[:] = chosen


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
    """Notes in words what was measured where a row names a limit: no test judges by the clock."""
    return lambda figure: record_property(_FIGURE, figure)


class _Report:
    """What became of each test, with its parameters."""

    def __init__(self, path: Path) -> None:
        self._path = path
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
        known = json.loads(self._path.read_text()) if self._path.exists() else {}
        tests = known.get("tests", {}) | self._tests
        told = {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "machine": {
                "cpus": os.cpu_count(),
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
        }
        self._path.write_text(_lines(told, tests))


def _lines(told: Mapping[str, Any], tests: Mapping[str, Any]) -> str:
    """JSON with a line for each test."""
    head = json.dumps(told, indent=1)[:-2]
    rows = [f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in sorted(tests.items())]
    return f'{head},\n "tests": {{\n' + ",\n".join(rows) + "\n }\n}\n"
