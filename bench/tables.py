"""Results as Markdown, for ``docs/performance.md``. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.figures import contest_heads, contest_notes, contest_rows, requirement_rows, short
from bench.results import FOLDER, PartResult, read_part

_GIB = 1 << 30


def part_text(name: str, folder: Path = FOLDER) -> str:
    """All of a part: where it was measured, its tables, what was left out and why."""
    path = folder / f"{name}.json"
    if not path.exists():
        return f"Not measured yet: `make bench BENCH_ARGS={name}`."
    result = read_part(path)
    if result.unavailable:
        return f"Not measured: {result.unavailable}."
    paragraphs = [_where(result)]
    for contest in result.contests:
        when = f" ({contest.when})" if contest.when else ""
        title = f"**{contest.title}**, {contest.size_bytes / 1e9:.2f} GB{when}"
        paragraphs += [_with_note(title, contest.note), table(contest_heads(contest), contest_rows(contest))]
        paragraphs += ["\n".join(f"- {note}" for note in contest_notes(contest))]
    for figures in result.tables:
        rows = [[short(cell) for cell in row] for row in figures.rows]
        paragraphs += [_with_note(f"**{figures.title}**", figures.note), table(figures.heads, rows)]
    return "\n\n".join(filter(None, paragraphs))


def required_text(folder: Path = FOLDER) -> str:
    """Every requirement of every part that was measured."""
    rows = [
        [path.stem, *cells] for path in sorted(folder.glob("*.json")) for cells in requirement_rows(read_part(path))
    ]
    heads = ("Part", "Requirement", "Measured", "Bound", "Reached")
    return table(heads, rows, text_columns=2) if rows else "Nothing was measured yet."


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table, the numbers behind its columns of text to the right; short rows are filled up."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * text_columns + "---:|" * (len(heads) - text_columns)]
    for row in rows:
        cells = [*row, *[""] * (len(heads) - len(row))]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _with_note(title: str, note: str) -> str:
    return f"{title}. {note}" if note else f"{title}."


def _where(result: PartResult) -> str:
    found: dict[str, Any] = result.hardware
    versions = ", ".join(_versions(result))
    memory = found.get("memory_bytes", 0) / _GIB
    parts = [
        f"{found.get('cores')} cores of {found.get('cpu')}",
        f"{memory:.0f} GiB",
        f"Linux {found.get('kernel')}",
        f"/dev/shm {found.get('shm_mount')}",
        f"disk {found.get('disk')}",
        *([f"GPU {found['gpu']}"] if found.get("gpu") else []),
    ]
    return (
        f"Measured {found.get('time', '')[:10]} at revision {found.get('revision')}, "
        f"{result.options.get('rounds')} rounds, medians. {'; '.join(parts)}. Versions: {versions}."
    )


def _versions(result: PartResult) -> list[str]:
    told = {item.version for contest in result.contests for item in contest.standings if item.version}
    named = sorted({one for version in told for one in version.split(", ") if " " in one})
    ours = [f"{name} {number}" for name, number in result.hardware.get("versions", {}).items()]
    return [*dict.fromkeys([*named, *ours])]
