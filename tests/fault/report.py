"""The table of docs/reliability.md: what the last runs of the fault suite noted, row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fault.rows import ROWS, Row, covering

RESULTS = Path(__file__).resolve().parent / "results.json"


def faults_text() -> str:
    """When and where, and a line for each row."""
    told = json.loads(RESULTS.read_text())
    machine = told["machine"]
    lines = [
        f"Last noted on {told['date']}: {machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}.",
        "",
        "| # | Fault | What is done | Cases | Survived | Not tried, and what stands in |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row, told["tests"])) + " |" for row in ROWS]
    return "\n".join(lines)


def _cells(row: Row, tests: Mapping[str, Any]) -> list[str]:
    entries = [entry for name, entry in tests.items() if row.number in covering(name)]
    noted = {part for name in tests for part in (name.partition("[")[0], name.partition("::")[0])}
    missing = [name for name in row.tests if name not in noted]
    cases = sum(entry["cases"] for entry in entries)
    failed = sum(entry["failed"] for entry in entries)
    survived = str(sum(entry["survived"] for entry in entries))
    gaps = [row.gap] if row.gap else []
    if missing:
        gaps.append(f"{len(missing)} of {len(row.tests)} were not part of the noted run; `make test-faults` runs them.")
    gaps += sorted({f"Skipped: {why.removeprefix('Skipped: ')}." for entry in entries if (why := entry.get("skipped"))})
    points = {point for entry in entries for point in entry.get("points", ())}
    done = [row.done, f"{len(points)} distinct points were reached"] if points else [row.done]
    done += [figure for entry in entries for figure in entry.get("figures", ())]
    return [
        str(row.number), row.fault, "; ".join(done), str(cases) if entries else "not noted",
        f"{survived}, {failed} tests failed" if failed else survived if entries else "", " ".join(gaps),
    ]  # fmt: skip
