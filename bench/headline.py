"""The few figures that the README shows, from the results. Standard library only."""

from __future__ import annotations

from pathlib import Path

from bench.figures import short
from bench.results import FOLDER, Contest, FigureTable, PartResult, Role, Standing, read_part
from bench.tables import table

_HEADS = ("", "`cached`, every byte checked", "best peer", "plain reads, nothing checked")
_ATTACHES = ("dense-x16", "moe")
_TICK_S = 0.01
"""Less than this the kernel's accounts do not tell."""


def headline_text(folder: Path = FOLDER) -> str:
    """One row for each hop that was measured, a sentence on where, and what was not measured."""
    parts = {path.stem: read_part(path) for path in sorted(folder.glob("*.json"))}
    rows = [
        *_rates(parts.get("s3"), {"": "cached-crc", "fresh memory": "cached-crc-nopool"}),
        *_rates(parts.get("nvme"), {"": "cached-huge", "4 KiB pages": "cached"}),
        *_attach(parts.get("warm")),
    ]
    if not rows:
        return "Nothing was measured yet."
    on_gpu = "" if _has_figures(parts.get("gpu")) else " Nothing was measured on a GPU."
    return f"{table(_HEADS, rows)}\n\n{_where(parts)}{on_gpu}"


def _has_figures(part: PartResult | None) -> bool:
    return part is not None and any(item.figure is not None for item in part.requirements)


def _rates(part: PartResult | None, ours: dict[str, str]) -> list[list[str]]:
    return [
        [_title(contest), _ours(contest, ours), _named(contest.best(Role.PEER)), _rate(contest.best(Role.LIMIT))]
        for contest in (part.contests if part else [])
    ]


def _title(contest: Contest) -> str:
    return f"{contest.title}, {contest.size_bytes / 1e9:.1f} GB"


def _ours(contest: Contest, names: dict[str, str]) -> str:
    told = [(label, contest.get(name)) for label, name in names.items()]
    return "; ".join(f"{label + ': ' if label else ''}{_rate(item)}" for label, item in told if item)


def _named(standing: Standing | None) -> str:
    return f"{standing.title}: {_rate(standing)}" if standing else "–"


def _rate(standing: Standing | None) -> str:
    if standing is None:
        return "–"
    cpu_s = standing.median("cpu_s_per_gb")
    told = short(cpu_s) if cpu_s >= _TICK_S else f"less than {_TICK_S}"
    return f"{short(standing.median('gb_per_s'))} GB/s, {told} CPU-s/GB"


def _attach(part: PartResult | None) -> list[list[str]]:
    rows = []
    for figures in part.tables if part else []:
        if figures.name not in _ATTACHES:
            continue
        ours, *others = (row for row in figures.rows if isinstance(row[1], float))
        best = min(others, key=lambda row: row[1] if isinstance(row[1], float) else float("inf"), default=None)
        told = f"{best[0]}: {short(best[1])} ms" if best else "–"
        rows.append([f"In memory → usable, {_of(figures)}", f"{short(ours[1])} ms", told, "–"])
    return rows


def _of(figures: FigureTable) -> str:
    return figures.title.partition(": ")[2].partition(", until")[0]


def _where(parts: dict[str, PartResult]) -> str:
    found = next(part.hardware for name, part in parts.items() if name in ("s3", "nvme", "warm"))
    memory = found.get("memory_bytes", 0) / (1 << 30)
    return (
        f"Medians of runs in turn on {found.get('cores')} cores of {found.get('cpu')}, {memory:.0f} GiB, with the S3 "
        "server on the same cores: ratios say more than rates. CPU-s/GB is all that the reader's side spent."
    )
