"""How hops are printed: a line each as soon as it is measured, or JSON with what they were measured on."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from cached.cli.bench.hop import Measured, Outcome, Setting
from cached.cli.doctor.daemon import nearest
from cached.cli.measure.hardware import describe
from cached.cli.output import clean, print_json

_COLOURS = {
    Outcome.EXPECTED: "green", Outcome.SLOWER: "yellow", Outcome.UNKNOWN: "", Outcome.NOT_MEASURED: "dim",
}  # fmt: skip
_INDENT = 4


class Printer:
    """Prints each hop at once: they take seconds."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._begun = False

    def show(self, item: Measured) -> None:
        """One hop: what was measured beside what is expected; below it what it was, and why it may be slow."""
        if not self._begun:
            self._console.print(Text(f"{'HOP':<14}{'MEASURED':>12}{'CPU-s/GB':>11}   {'':<13} EXPECTED", style="bold"))
            self._begun = True
        outcome = Text(f"{item.outcome:<13}", style=_COLOURS[item.outcome])
        figures = f"{_figure(item):>12}{_cpu(item):>11}   "
        expected = _expected(item) if item.outcome is not Outcome.NOT_MEASURED else clean(item.note)
        line = Text.assemble((f"{item.hop:<14}", "bold"), figures, outcome, " ", expected)
        self._console.print(line)
        if item.outcome is Outcome.NOT_MEASURED:
            return
        self._below(f"{item.about}{f'; {item.note}' if item.note else ''}")
        if item.outcome is Outcome.SLOWER:
            self._below(f"usually: {item.reasons}", "yellow")
            self._below(f"→ cached doctor --only {item.check}", "cyan")

    def _below(self, text: str, style: str = "dim") -> None:
        shown = [clean(text)]
        if self._console.is_terminal:
            shown = textwrap.wrap(shown[0], max(30, self._console.width - _INDENT), break_on_hyphens=False)
        for line in shown:
            self._console.print(Text(" " * _INDENT + line, style=style))


def _figure(item: Measured) -> str:
    if item.outcome is Outcome.NOT_MEASURED:
        return "-"
    return f"{item.value:.2f} {item.unit}" if item.value < 10 else f"{item.value:.1f} {item.unit}"


def _cpu(item: Measured) -> str:
    return "" if item.cpu_s_per_gb is None else f"{item.cpu_s_per_gb:.2f}"


def _expected(item: Measured) -> str:
    return item.expected.shown if item.expected is not None else "nothing is known of what it should be"


def print_results(found: Sequence[Measured], setting: Setting, output: str) -> None:
    """The last line, or all of it as JSON."""
    if output == "json":
        place = Path(nearest(setting.config.l2.folders[0] or "/"))
        print_json({"hardware": describe(place), "size_bytes": setting.size_bytes, "hops": list(map(_data, found))})
        return
    counts = [(outcome, sum(item.outcome is outcome for item in found)) for outcome in Outcome]
    click.echo("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts if count))


def _data(item: Measured) -> dict[str, Any]:
    measured = item.outcome is not Outcome.NOT_MEASURED
    return {
        "hop": item.hop,
        "about": item.about,
        "outcome": item.outcome,
        "value": item.value if measured else None,
        "unit": item.unit,
        "cpu_s_per_gb": item.cpu_s_per_gb,
        "least": item.expected.least if item.expected is not None else None,
        "expected": item.expected.shown if item.expected is not None else "",
        "note": item.note,
        "reasons": item.reasons if item.outcome is Outcome.SLOWER else "",
        "check": item.check if item.outcome is Outcome.SLOWER else "",
        "more": dict(item.more),
    }
