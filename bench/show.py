"""Results for people: while they come, and as tables at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.results import Cell, Contest, Figure, PartResult, Role, Standing

HEADS = ("contestant", "GB/s", "least–most", "CPU-s/GB", "all CPU-s/GB", "server CPU-s/GB", "of the limit", "of ours")
"""Columns of a contest."""

_STYLES = {Role.OURS: "bold green", Role.PEER: "", Role.LIMIT: "cyan"}


def turn_printer(console: Console) -> Callable[[int, Standing], None]:
    """For ``contest.hold``: one line for each turn."""

    def say(number: int, standing: Standing) -> None:
        if standing.reason:
            console.print(f"  round {number + 1}  {standing.name:<22} not measured: {standing.reason}", style="yellow")
            return
        sample = standing.samples[-1]
        extra = "".join(f"  {name} {short(value)}" for name, value in sample.extra.items())
        console.print(
            f"  round {number + 1}  {standing.name:<22} {sample.seconds:7.3f} s  {sample.gb_per_s:5.2f} GB/s  "
            f"{sample.cpu_s_per_gb:5.2f} CPU-s/GB{extra}"
        )

    return say


def contest_rows(contest: Contest) -> list[list[str]]:
    """Cells under HEADS for each contestant; one that was not measured has only the first two."""
    limit, ours = contest.first(Role.LIMIT), contest.first(Role.OURS)
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


def show_part(console: Console, result: PartResult) -> None:
    """All tables and requirements of a part."""
    if result.unavailable:
        console.print(f"{result.title}: not measured here: {result.unavailable}", style="yellow")
    for contest in result.contests:
        table = _table(contest.title, HEADS)
        for standing, cells in zip(contest.standings, contest_rows(contest), strict=True):
            table.add_row(*cells, style=_STYLES[standing.role])
        console.print(table)
        for note in contest_notes(contest):
            console.print(f"  {note}", style="yellow", markup=False)
    for figures in result.tables:
        table = _table(figures.title, figures.heads)
        for row in figures.rows:
            table.add_row(*map(short, row))
        console.print(table)
    if result.requirements:
        table = _table("Required", ("requirement", "measured", "bound", "reached"))
        for cells in requirement_rows(result):
            table.add_row(*cells, style="red" if cells[3] == "no" else "")
        console.print(table)


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


def _table(title: str, heads: Any) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    return table
