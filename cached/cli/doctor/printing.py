"""How findings are printed: for people as wide as their terminal is, for programs as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from cached.cli.doctor.checks import Check, Finding, Verdict
from cached.cli.output import clean

_COLOURS = {Verdict.OK: "green", Verdict.ADVICE: "yellow", Verdict.PROBLEM: "bold red", Verdict.NOT_MEASURED: "dim"}
_NARROW_COLUMNS = 90
_VERDICT_COLUMNS = 14
_NAME_COLUMNS = 15
_INDENT_COLUMNS = 4
_ARROW = "→ "


class Printer:
    """Prints each finding at once: some take seconds. Groups have a heading."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._group = ""

    def show(self, check: Check, finding: Finding) -> None:
        """One finding, with what mends it below."""
        if check.group != self._group:
            self._console.print(Text(f"{'' if not self._group else chr(10)}{check.group.upper()}", style="bold"))
            self._group = check.group
        verdict = Text(f"{finding.verdict:<{_VERDICT_COLUMNS}}", style=_COLOURS[finding.verdict])
        name = Text(f"{check.name:<{_NAME_COLUMNS}}", style="bold")
        narrow = self._console.is_terminal and self._console.width < _NARROW_COLUMNS
        indent = _INDENT_COLUMNS if narrow else _VERDICT_COLUMNS + _NAME_COLUMNS
        told = self._wrapped(clean(finding.told), indent)
        if narrow:
            self._console.print(Text.assemble(verdict, name))
            told = [" " * indent + told[0], *told[1:]]
            self._console.print("\n".join(told), markup=False)
        else:
            self._console.print(Text.assemble(verdict, name, "\n".join(told)))
        if finding.mend:
            mend = self._wrapped(clean(finding.mend), indent + len(_ARROW))
            self._console.print(Text.assemble(" " * indent, (_ARROW, "cyan"), "\n".join(mend)))

    def _wrapped(self, text: str, indent: int) -> list[str]:
        """Lines of which all but the first begin at the indent. What is not for a terminal stays one line."""
        if not self._console.is_terminal:
            return [text]
        width = max(20, self._console.width - indent)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
        return [lines[0], *(" " * indent + line for line in lines[1:])]


def summary(found: Sequence[tuple[Check, Finding]]) -> str:
    """The last line."""
    counts = {verdict: sum(finding.verdict is verdict for _, finding in found) for verdict in Verdict}
    parts = [
        f"{counts[Verdict.OK]} ok",
        _count(counts[Verdict.PROBLEM], "problem"),
        f"{_count(counts[Verdict.ADVICE], 'piece')} of advice",
    ]
    if counts[Verdict.NOT_MEASURED]:
        parts.append(f"{counts[Verdict.NOT_MEASURED]} not measured")
    return ", ".join(parts)


def _count(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'' if number == 1 else 's'}"


def as_data(found: Sequence[tuple[Check, Finding]]) -> dict[str, Any]:
    """For programs."""
    return {
        "problems": sum(finding.verdict is Verdict.PROBLEM for _, finding in found),
        "findings": [_data(*pair) for pair in found],
    }


def _data(check: Check, finding: Finding) -> Mapping[str, Any]:
    return {
        "check": check.name,
        "group": check.group,
        "about": check.about,
        "verdict": finding.verdict,
        "told": finding.told,
        "measured": {name: value for name, value in finding.measured.items() if value not in _NO_NUMBERS},
        "mend": finding.mend,
    }


_NO_NUMBERS = (float("inf"), float("-inf"))
"""JSON has none for them."""
