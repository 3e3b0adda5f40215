"""What ``bench.artifacts`` found, as the table of docs/artifacts.md."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

RESULT = Path(__file__).resolve().parent / "results" / "artifacts" / "starts.json"
COLUMNS = ("Start", "Restore", "First call", "Whole process", "Graphs compiled", "Graphs loaded")

Starts = dict[str, list[dict[str, Any]]]


def rows_of(starts: Starts) -> list[tuple[str, ...]]:
    """Medians of the times, sums of the counts."""
    rows = []
    for what, told in starts.items():
        times = [statistics.median(row[name] for row in told) for name in ("restore_s", "compile_s", "process_s")]
        counts = [str(sum(row[name] for row in told)) for name in ("misses", "hits")]
        rows.append((what, *(f"{value:.2f} s" for value in times), *counts))
    return rows


def starts_text() -> str:
    """A sentence on what was measured where, and the table."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    starts, hardware = found["starts"], found["hardware"]
    table = [COLUMNS, tuple("---" for _ in COLUMNS), *rows_of(starts)]
    where = (
        f"{hardware['cpu']}, {hardware['cores']} cores, torch {hardware['versions']['torch']}, {hardware['time'][:10]}"
    )
    count = len(next(iter(starts.values())))
    return f"{where}; median of {count} starts of each kind.\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in table)
