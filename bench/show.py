"""Results for people: while they come, and as tables at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.figures import contest_heads, contest_notes, contest_rows, requirement_rows, short
from bench.results import PartResult, Role, Standing

_STYLES = {Role.OURS: "bold green", Role.PEER: "", Role.LIMIT: "cyan"}


def turn_printer(console: Console) -> Callable[[int, Standing], None]:
    """For ``contest.hold``: one line for each turn."""

    def say(number: int, standing: Standing) -> None:
        if standing.reason:
            console.print(
                f"  round {number + 1}  {standing.name:<22} not measured: {standing.reason}",
                style="yellow", markup=False,
            )  # fmt: skip
            return
        sample = standing.samples[-1]
        extra = "".join(f"  {name} {short(value)}" for name, value in sample.extra.items())
        console.print(
            f"  round {number + 1}  {standing.name:<22} {sample.seconds:7.3f} s  {sample.gb_per_s:5.2f} GB/s  "
            f"{sample.cpu_s_per_gb:5.2f} CPU-s/GB{extra}"
        )

    return say


def show_part(console: Console, result: PartResult) -> None:
    """All tables and requirements of a part."""
    if result.unavailable:
        console.print(f"{result.title}: not measured here: {result.unavailable}", style="yellow", markup=False)
    for contest in result.contests:
        table = _table(contest.title, contest_heads(contest))
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


def _table(title: str, heads: Any) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number == 0 else "right")
    return table
