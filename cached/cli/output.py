"""What commands print: tables and lines for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, MutableSequence, Sequence
from typing import Any, TypeVar

import click
from google.protobuf.message import Message
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cached.overview.words import clean
from cached.units import format_duration, format_rate, format_size

__all__ = [
    "ago", "clean", "enum_word", "is_terminal", "output_option", "print_json", "print_pairs", "print_table",
    "print_text", "rate", "say", "short", "size", "to_data",
]  # fmt: skip

_F = TypeVar("_F", bound=Callable[..., Any])
_UNBOUNDED_COLUMNS = 100_000
_UNSPECIFIED = "UNSPECIFIED"


def output_option(function: _F) -> _F:
    """``-o table|json`` for everything that reads; the command gets ``output``."""
    option = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json"]),
        default="table",
        show_default=True,
        help="A table for people, or JSON for programs.",
    )
    return option(function)


def to_data(message: Message) -> dict[str, Any]:
    """A message as JSON holds it: the names of the .proto, numbers as numbers, enums as their words in lower case."""
    return {field.name: _field_data(message, field) for field in message.DESCRIPTOR.fields}


def _field_data(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if isinstance(value, MutableMapping):
        return dict(sorted(value.items()))
    if isinstance(value, MutableSequence):
        return [_item_data(field, item) for item in value]
    if isinstance(value, Message) and not message.HasField(field.name):
        return None
    return _item_data(field, value)


def _item_data(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return to_data(value)
    if field.enum_type is not None:
        return _enum_word(field.enum_type, value)
    return value


def _enum_word(enum_type: Any, number: int) -> str:
    """``LEVEL_L1`` → ``l1``; unspecified is empty; a number that this version does not know stays a number."""
    known = enum_type.values_by_number
    if number not in known:
        return str(number)
    prefix = enum_type.values[0].name.removesuffix(_UNSPECIFIED)
    word: str = known[number].name.removeprefix(prefix)
    return "" if word == _UNSPECIFIED else word.lower()


def enum_word(message: Message, name: str) -> str:
    """The word of an enum field, as in JSON."""
    return _enum_word(message.DESCRIPTOR.fields_by_name[name].enum_type, getattr(message, name))


def print_json(data: Any) -> None:
    """One document on standard output."""
    click.echo(json.dumps(data, indent=2, ensure_ascii=False))


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    spare: Sequence[str] = (),
    folding: Sequence[str] = (),
) -> None:
    """Aligned columns; cells fold on a terminal, and elsewhere no line is broken.

    ``right``: columns aligned there. ``spare``: those that a terminal too narrow for all is not shown, the first to go
    first. ``folding``: those alone whose cells fold, where there are any.
    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_UNBOUNDED_COLUMNS)
    shown = _fitting(columns, rows, spare, folding, console.width)
    table = Table(box=None, pad_edge=False, header_style="bold", show_edge=False)
    for index in shown:
        name = columns[index]
        table.add_column(
            name,
            justify="right" if name in right else "left",
            overflow="fold",
            no_wrap=bool(folding) and name not in folding,
        )
    for row in rows:
        table.add_row(*[Text(clean(row[index])) for index in shown])
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as captured:
        console.print(table)
    for line in captured.get().splitlines():
        click.echo(line.rstrip())


_GAP = 2
_READABLE = 18
"""What a column that folds wants at least, before others are left out for it."""


def _fitting(
    columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str], folding: Sequence[str], width: int
) -> list[int]:
    """The columns that are shown: without the spare ones that make a line too long."""
    wanted = []
    for index, name in enumerate(columns):
        widest = max((cell_len(text) for text in (name, *(clean(row[index]) for row in rows))), default=0)
        wanted.append(min(widest, _READABLE) if name in folding else widest)
    shown = list(range(len(columns)))
    for name in spare:
        if sum(wanted[index] + _GAP for index in shown) - _GAP <= width:
            break
        shown.remove(columns.index(name))
    return shown


def print_pairs(pairs: Mapping[str, str]) -> None:
    """``name: value`` lines, aligned; empty values are left out."""
    shown = {key: value for key, value in pairs.items() if value}
    width = max((len(key) for key in shown), default=0)
    for key, value in shown.items():
        click.echo(click.style(f"{key + ':':<{width + 2}}", bold=True) + clean(value))


def print_text(text: str) -> None:
    """A paragraph; on a terminal no word of it is broken."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(Text(clean(text)))
    else:
        click.echo(clean(text))


def say(text: str) -> None:
    """A line for people on standard error: never in the way of what a program reads."""
    click.echo(clean(text), err=True)


def short(revision: str) -> str:
    """A revision as people read it."""
    return revision[:12]


def size(size_bytes: float) -> str:
    """A size, or ``-`` for nothing."""
    return format_size(size_bytes) if size_bytes else "-"


def rate(size_bytes: float, seconds: float) -> str:
    """``1.5 GB/s``; empty when nothing was measured."""
    return format_rate(size_bytes / seconds) if seconds > 0 else ""


def ago(time_s: float, now_s: float | None = None) -> str:
    """How long ago a time was; ``-`` for never."""
    if time_s <= 0:
        return "-"
    return f"{format_duration(max(0.0, (time.time() if now_s is None else now_s) - time_s))} ago"


def is_terminal() -> bool:
    """Whether progress goes to a person's terminal."""
    return sys.stderr.isatty()
