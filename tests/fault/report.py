"""The table of docs/reliability.md: what the last runs of the fault suite noted, row by row."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.fault.noted import RESULTS
from tests.fault.rows import ROWS, Row, covering

Tests = Mapping[str, Mapping[str, Any] | None]
_NAMED = 12
"""So many sets of parameters that were never run are named."""


def faults_text() -> str:
    """When and where, and a line for each row."""
    told = json.loads(RESULTS.read_text())
    tests: Tests = told["tests"]
    lines = [
        _runs(tests, told["machines"]),
        "",
        "| # | Fault | What is done | Cases | Survived | Not tried, and what stands in |",
        "|---|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(_cells(row, tests)) + " |" for row in ROWS]
    return "\n".join(lines)


def _runs(tests: Tests, machines: Mapping[str, str]) -> str:
    """Whether the table is of one commit or of several, of which, and what was never run."""
    runs = Counter((entry["date"], entry["commit"]) for entry in tests.values() if entry)
    where = "; ".join(dict.fromkeys(machines.values()))
    never = sum(entry is None for entry in tests.values())
    rest = f" {never} were never run; their rows name them." if never else " None was never run."
    if len(runs) == 1:
        ((date, commit),) = runs
        return f"All of one commit, `{commit}`, on {date}: {where}. {sum(runs.values())} tests.{rest}"
    parts = [f"{count} at `{commit}` ({date})" for (date, commit), count in sorted(runs.items(), reverse=True)]
    return f"Not of one run, but of {len(runs)} commits. Tests last noted: {', '.join(parts)}.{rest} {where}."


def _cells(row: Row, tests: Tests) -> list[str]:
    mine = {name: entry for name, entry in tests.items() if row.number in covering(name)}
    ran = {name: entry for name, entry in mine.items() if entry}
    entries = list(ran.values())
    failed = sum(entry["failed"] for entry in entries)
    survived = str(sum(entry["survived"] for entry in entries))
    gaps = [row.gap] if row.gap else []
    gaps += never_run(sorted(mine.keys() - ran.keys()), len(mine))
    gaps += sorted({f"Skipped: {why.removeprefix('Skipped: ')}." for entry in entries if (why := entry.get("skipped"))})
    done = [row.done, *_points(ran)]
    done += [figure for entry in entries for figure in entry.get("figures", ())]
    return [
        str(row.number), row.fault, "; ".join(done),
        str(sum(entry["cases"] for entry in entries)) if entries else "not noted",
        f"{survived}, {failed} tests failed" if failed else survived if entries else "", " ".join(gaps),
    ]  # fmt: skip


def _points(ran: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How many distinct ones, and how many of them in the command that works without a daemon."""
    points = {point: name for name, entry in ran.items() for point in entry.get("points", ())}
    if points:
        alone = sum("standalone" in name for name in points.values())
        of_them = f", {alone} of them of the standalone command" if alone else ""
        yield f"{len(points)} distinct points were reached{of_them}"


def never_run(missing: Sequence[str], of: int) -> Iterator[str]:
    """What of a row's tests has no outcome, by function and parameters."""
    if not missing:
        return
    parameters: dict[str, list[str]] = defaultdict(list)
    for name in missing[:_NAMED]:
        function, _, inner = name.rpartition("::")[2].partition("[")
        parameters[function] += [inner.removesuffix("]")] if inner else []
    shown = [f"`{function}`" + f" ({', '.join(inner)})" * bool(inner) for function, inner in parameters.items()]
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    yield f"{len(missing)} of {of} were never run: {', '.join(shown)}{more}."
