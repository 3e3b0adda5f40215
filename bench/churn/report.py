"""What a run of the churn found: judged, and as tables for people and for ``docs/reliability.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from bench.churn.run import Outcome
from bench.churn.samples import Trend, trend
from bench.figures import short
from bench.results import FOLDER, Cell, FigureTable, PartResult, Requirement, read_part
from bench.tables import table

RESULTS = FOLDER / "churn"

GROWTH = {
    "anonymous_mb": ("daemon: own memory (anonymous)", "MB", 8.0),
    "rss_mb": ("daemon: RSS", "MB", 8.0),
    "pss_mb": ("daemon: PSS", "MB", 8.0),
    "python_blocks": ("daemon: blocks that Python has allocated", "", 60_000.0),
    "other_tasks": ("daemon: tasks of its event loop beyond three for each lease", "", 40.0),
    "descriptors": ("daemon: descriptors", "", 8.0),
    "threads": ("daemon: threads", "", 2.0),
    "mover_anonymous_mb": ("oldest mover: own memory (anonymous)", "MB", 8.0),
    "mover_descriptors": ("oldest mover: descriptors", "", 8.0),
    "mover_threads": ("oldest mover: threads", "", 2.0),
    "segments": ("/dev/shm: segments", "", 60.0),
    "segment_mb": ("/dev/shm: their bytes", "MB", 40.0),
    "leases": ("leases", "", 30.0),
}
"""Quantity → what it is, its unit, and the most that it may grow in an hour, by the straight line through it."""

_SHOWN = {
    "tasks": ("daemon: tasks of its event loop", ""),
    "movers": ("movers", ""), "loads": ("loads under way", ""), "l1_used_mb": ("L1 used", "MB"),
    "l1_reserved_mb": ("L1 reserved", "MB"), "l2_used_mb": ("L2 used", "MB"), "l2_reserved_mb": ("L2 reserved", "MB"),
    "state_mb": ("state folder", "MB"), "malloc_used_mb": ("daemon: given out by the C library", "MB"),
    "malloc_free_mb": ("daemon: kept by the C library", "MB"),
}  # fmt: skip
"""Shown, and not judged: bounded by budgets, or by what is under way."""

_LEAST_JUDGED_S = 1200.0
"""In a shorter time noise is larger than any growth that matters."""


def as_result(outcome: Outcome, name: str, note: str = "") -> PartResult:
    """Tables and requirements, ready to be written."""
    plan = outcome.plan
    unexpected = outcome.tally.unexpected(plan.daemon_kill_s > 0)
    options = {"note": note, "seed": plan.seed, "unexpected": unexpected, "problems": outcome.problems}
    result = PartResult(name, "Everything at once, for long", options=options)
    result.tables = [
        FigureTable("run", "The run", ["", "figure"], list(_facts(outcome))),
        FigureTable(
            "trends", "What the processes have, over the last two thirds of the time",
            ["quantity", "before", "line, begin", "line, end", "growth/h", "least", "most", "afterwards, at rest"],
            list(_trend_rows(outcome)),
        ),
        FigureTable("operations", "What was done", ["operation", "done", "refused", "why"], list(_operations(outcome))),
        FigureTable(
            "latencies", "Milliseconds, on cores that are never idle",
            ["operation", "p50, first third", "p99", "p50, last third", "p99", "of each"], list(_latencies(outcome)),
        ),
    ]  # fmt: skip
    result.requirements = list(_requirements(outcome))
    return result


def churn_text(folder: Path = RESULTS) -> str:
    """All kept runs, for the document."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return "Not run yet: `make churn`."
    return "\n\n".join(_text(read_part(file)) for file in files)


def _text(result: PartResult) -> str:
    found = result.hardware
    where = (
        f"Begun {found.get('started')} at revision {found.get('revision')}, {found.get('cores')} cores of "
        f"{found.get('cpu')}, {found.get('memory_bytes', 0) / (1 << 30):.0f} GiB, Linux {found.get('kernel')}."
    )
    note = result.options.get("note") or ""
    parts = [f"{where} {note}".strip()]
    for figures in result.tables:
        rows = [[short(cell) for cell in row] for row in figures.rows]
        parts += [f"**{figures.title}.**", table(figures.heads, rows)]
    words = {True: "yes", False: "no", None: "not judged"}
    rows = [
        [
            item.text,
            f"{short(item.figure)} {item.unit}".strip(),
            f"≤ {short(item.bound)} {item.unit}".strip(),
            words[item.reached],
        ]
        for item in result.requirements
    ]
    return "\n\n".join([*parts, "**Judged.**", table(("", "found", "bound", "held"), rows)])


def _facts(outcome: Outcome) -> Iterator[list[Cell]]:
    plan, tally = outcome.plan, outcome.tally
    done = sum(tally.counts.values()) + sum(tally.errors.values())
    held = sorted(sample["leases"] for sample in outcome.samples)
    yield ["minutes", round(outcome.seconds / 60, 1)]
    yield ["models", plan.models]
    yield ["their bytes, MB", round(outcome.model_bytes / 1e6)]
    yield ["leases asked for", plan.leases]
    if held:
        yield ["leases held, median", held[len(held) // 2]]
        yield ["leases held, most", held[-1]]
    yield ["worker processes", plan.workers]
    yield ["operations", done]
    yield ["operations a second", round(done / max(1.0, outcome.seconds), 1)]
    yield ["files read and checked by SHA-256", tally.counts["file read and checked"]]
    for what, count in outcome.happened.items():
        yield [what, count]


def _trend_rows(outcome: Outcome) -> Iterator[list[Cell]]:
    known = {name: (title, unit) for name, (title, unit, _) in GROWTH.items()} | _SHOWN
    for name, (title, unit) in known.items():
        found = trend(outcome.samples, name)
        if found is not None:
            yield [
                f"{title}, {unit}" if unit else title, outcome.before.get(name), found.first, found.last,
                found.per_hour, found.least, found.most, outcome.after.get(name),
            ]  # fmt: skip


def _operations(outcome: Outcome) -> Iterator[list[Cell]]:
    refused: dict[str, Counter[str]] = {}
    for what, count in outcome.tally.errors.items():
        operation, _, reason = what.rpartition(": ")
        refused.setdefault(operation, Counter())[reason] += count
    for operation in sorted({*outcome.tally.counts, *refused}):
        reasons = refused.get(operation, Counter())
        why = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
        yield [operation, outcome.tally.counts[operation], sum(reasons.values()), why]


def _latencies(outcome: Outcome) -> Iterator[list[Cell]]:
    for name, (times, values) in sorted(outcome.tally.latencies_ms.items()):
        begin_s, third_s = times[0], (times[-1] - times[0]) / 3
        first = [value for at, value in zip(times, values, strict=True) if at <= begin_s + third_s]
        last = [value for at, value in zip(times, values, strict=True) if at >= begin_s + 2 * third_s]
        cells = [_quantile(part, share) for part in (first, last) for share in (0.5, 0.99)]
        yield [name, *cells, len(values)]


def _quantile(values: list[float], share: float) -> float | None:
    return sorted(values)[ceil(share * len(values)) - 1] if values else None


def _requirements(outcome: Outcome) -> Iterator[Requirement]:
    yield Requirement("wrong bytes, processes that fell, and what was left over", len(outcome.problems), 0, False)
    yield Requirement("errors of an unexpected kind", _unexpected_count(outcome), 0, False)
    over = max((max(item["l1_over_mb"], item["l2_over_mb"]) for item in outcome.samples), default=None)
    yield Requirement("used and reserved beyond a level's capacity and allowance", over, 0, False, "MB")
    for name, (title, unit, bound) in GROWTH.items():
        figure = _judged(outcome, trend(outcome.samples, name))
        yield Requirement(f"growth in an hour, {title}", figure, bound, False, unit)


def _unexpected_count(outcome: Outcome) -> int:
    kinds = outcome.tally.unexpected(outcome.plan.daemon_kill_s > 0)
    return sum(outcome.tally.errors[what] for what in kinds)


def _judged(outcome: Outcome, found: Trend | None) -> float | None:
    long_enough = outcome.seconds >= _LEAST_JUDGED_S and not outcome.plan.daemon_kill_s
    return found.per_hour if found is not None and long_enough else None
