"""The rows of a result's tables, as text. Standard library only."""

from __future__ import annotations

from bench.results import Cell, Contest, Figure, PartResult, Role, Standing

HEADS = ("contestant", "GB/s", "least–most", "CPU-s/GB", "all CPU-s/GB", "server CPU-s/GB", "of the limit", "of ours")
"""Columns of every contest."""


def contest_heads(contest: Contest) -> list[str]:
    """HEADS, and the figures that only this contest has."""
    return [*HEADS, *contest.extra()]


def contest_rows(contest: Contest) -> list[list[str]]:
    """Cells under its heads for each contestant; one that was not measured has only the first two."""
    limit, ours = contest.best(Role.LIMIT), contest.first(Role.OURS)
    rows = []
    for item in contest.standings:
        if not item.measured:
            rows.append([item.title, "failed" if item.failed else "not measured"])
            continue
        rate = item.over("gb_per_s")
        rows.append(
            [
                item.title,
                short(rate.median),
                spread(rate),
                short(item.median("cpu_s_per_gb")),
                short(item.median("total_cpu_s_per_gb")),
                short(item.median("server_cpu_s_per_gb")) if any(s.server_cpu_s for s in item.samples) else "–",
                _share(rate.median, limit),
                _share(rate.median, ours),
                *(short(item.median(name)) if name in item.samples[0].extra else "–" for name in contest.extra()),
            ]
        )
    return rows


def contest_notes(contest: Contest) -> list[str]:
    """Why contestants were not measured, or not in all rounds; one line each."""
    return [
        f"{item.title}: {'failed' if item.failed else 'not measured'}"
        f"{f' after {len(item.samples)} rounds' if item.samples else ''}: {item.reason}"
        for item in contest.standings
        if item.reason
    ]


def requirement_rows(result: PartResult) -> list[list[str]]:
    """Text, figure, bound, and whether it was reached."""
    words = {True: "yes", False: "no", None: "not measured"}
    return [
        [
            item.text,
            f"{short(item.figure)} {item.unit}".strip(),
            f"{'≥' if item.at_least else '≤'} {short(item.bound)} {item.unit}".strip(),
            words[item.reached],
        ]
        for item in result.requirements
    ]


def short(value: Cell) -> str:
    """Three significant digits; text as it is; a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, str | int):
        return str(value)
    if abs(value) >= 100 or value == 0:
        return f"{value:.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.2g}"


def spread(figure: Figure) -> str:
    """Least and most."""
    return f"{short(figure.least)}–{short(figure.most)}"


def _share(rate: float, of: Standing | None) -> str:
    return short(rate / of.median("gb_per_s")) if of else "–"
