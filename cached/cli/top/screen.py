"""An overview as lines of a terminal: as many as fit, or all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.text import Text

from cached.overview import Holding, LevelUse, Move, MovePhase, Overview
from cached.overview.words import (
    WRONG,
    advice,
    clean,
    idle_text,
    kind_text,
    notes_text,
    percent,
    process_text,
    progress_text,
    source_text,
    speed_text,
    state_text,
    waiting_text,
)
from cached.types import LevelStats, ModelSummary
from cached.units import format_duration, format_size

MARKS: Mapping[Holding, tuple[str, str]] = {
    Holding.PINNED: ("P", "white on magenta"),
    Holding.HOT: ("H", "white on red"),
    Holding.WARM: ("W", "black on yellow"),
    Holding.AUTO: ("A", "black on cyan"),
    Holding.COLD: ("C", "white on blue"),
    Holding.TRANSIENT: ("T", "black on bright_magenta"),
    Holding.PARTIAL: ("/", "black on white"),
    Holding.WITHDRAWN: ("x", "black on white"),
    Holding.POOL: ("=", "dim"),
    Holding.RESERVED: ("+", "bold"),
    Holding.FREE: (".", "dim"),
}
"""What a cell of a level's bar shows: letters, so that it can be read without colours."""

VIEWS = ("models", "leases", "events")
SORTS: Mapping[str, Callable[[ModelSummary], object]] = {
    "place": lambda _model: 0,
    "name": lambda model: model.name,
    "size": lambda model: -model.size_bytes,
    "worth": lambda model: -model.worth_s,
    "leases": lambda model: -model.lease_count,
}
_MOVES = 4
"""On a screen; the others are counted."""
_ALL_FROM = 24
"""Free lines from which models, leases and events are shown together."""
_WIDE, _ROOMY = 100, 116
"""Columns from which moves have a second line, and from which their bytes are told beside their speed."""
_GAP = 2
_READABLE = 18
"""Cells that a column which may be cut has at least, before others are left out for it."""


@dataclass(frozen=True, slots=True)
class Column:
    """Of a list. ``cut``: its cells may be cut. ``spare``: left out where it gets tight, the highest first."""

    head: str
    right: bool = False
    cut: bool = False
    spare: int = 0


_MODELS = (
    Column("MODEL", cut=True), Column("STATE"), Column("TIER"), Column("SIZE", right=True, spare=1),
    Column("LEASES", right=True, spare=2), Column("IDLE", right=True), Column("WORTH", right=True, spare=3),
    Column("NOTES", cut=True, spare=4),
)  # fmt: skip
_LEASES = (
    Column("LEASE ON", cut=True), Column("WORKER", cut=True), Column("PROCESS", cut=True, spare=1),
    Column("HELD FOR", right=True), Column("MAPPED", right=True, spare=2),
)  # fmt: skip
_EVENTS = (Column("TIME"), Column("DECISION"), Column("WHY", cut=True))


@dataclass(frozen=True, slots=True)
class Choice:
    """What of the lists is shown where not all of them fit, and how models are sorted."""

    view: str = VIEWS[0]
    sort: str = "place"


@dataclass(frozen=True, slots=True)
class Screen:
    """Something that rich prints. ``lost``: why the daemon does not answer, since when. ``height`` None: no end."""

    overview: Overview
    host: str
    choice: Choice = Choice()
    lost: str = ""
    height: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Never more lines than there are."""
        width = options.max_width
        lines = console.render_lines(Group(*self._pieces(width)), options.update(height=None), pad=False)
        shown = lines if self.height is None else lines[: self.height]
        for number, line in enumerate(shown):
            yield from line
            if self.height is None or number + 1 < len(shown):
                yield Segment.line()

    def _pieces(self, width: int) -> list[RenderableType]:
        overview = self.overview
        top = [*self._head(), *self._levels(width), *self._moves(width)]
        if self.height is None:
            return [*top, *self._lists(len(overview.models), len(overview.leases), len(overview.events), width)]
        left = self.height - len(top) - 2
        if left >= _ALL_FROM:
            leases, events = (max(1, min(count, left // 4)) for count in (len(overview.leases), len(overview.events)))
            body = self._lists(max(1, left - leases - events - 8), leases, events, width)
        else:
            show = {"models": self._models, "leases": self._leases, "events": self._events}[self.choice.view]
            body = show(left, width)
        return [*top, *body, Text(""), _keys(self.choice)]

    def _lists(self, models: int, leases: int, events: int, width: int) -> list[RenderableType]:
        """So many rows of each, with their heads, and what says that there are more."""
        shown = (self._models(models + 2, width), self._leases(leases + 2, width), self._events(events + 2, width))
        return [*shown[0], Text(""), *shown[1], Text(""), *shown[2]]

    def _head(self) -> list[RenderableType]:
        overview, stats = self.overview, self.overview.stats
        now = f"{datetime.fromtimestamp(overview.time_s).astimezone():%H:%M:%S}"
        state = ("needs attention", "bold yellow") if overview.problems else ("all is well", "bold green")
        head = Text.assemble(("cached on ", ""), (clean(self.host), "bold"), "  ", state, no_wrap=True)
        head.append(f"  {stats.version}, up {format_duration(stats.uptime_s)}, {now}", "dim")
        lines: list[RenderableType] = [head]
        if self.lost:
            lines.append(Text(clean(self.lost), "bold white on red", no_wrap=True, overflow="ellipsis"))
        shown = overview.problems if self.height is None else overview.problems[:2]
        for problem in shown:
            name = f"{problem.name}: " if problem.name else ""
            text = f"! {name}{clean(problem.message)}. {advice(problem).text}"
            lines.append(Text(clean(text), "yellow", no_wrap=self.height is not None, overflow="ellipsis"))
        if more := len(overview.problems) - len(shown):
            lines.append(Text(f"! and {more} more: cached health", "yellow"))
        return lines

    # Levels.

    def _levels(self, width: int) -> Iterable[RenderableType]:
        for stats, use in zip(self.overview.stats.levels, self.overview.uses, strict=True):
            yield _level_bar(stats, use, width)
            yield from _legend(stats, use, width)
        yield Text("")

    # Moves.

    def _moves(self, width: int) -> list[RenderableType]:
        moves = self.overview.moves if self.height is None else self.overview.moves[:_MOVES]
        if not moves:
            return [Text("Nothing is being pulled, promoted or written.", "dim"), Text("")]
        lines: list[RenderableType] = [_move_line(move, width) for move in moves]
        if width >= _WIDE or self.height is None:
            lines = [line for move in moves for line in (_move_line(move, width), _move_note(move))]
        if more := self.overview.move_count - len(moves):
            lines.append(Text(f"and {more} more", "dim"))
        return [*lines, Text("")]

    # Lists.

    def _models(self, count: int, width: int) -> list[RenderableType]:
        overview = self.overview
        models = sorted(overview.models, key=SORTS[self.choice.sort])  # type: ignore[arg-type]
        rows = [
            (
                model.name, state_text(model), model.tier.value,
                format_size(model.size_bytes) if model.size_bytes else "", str(model.lease_count or ""),
                idle_text(model, overview.time_s), format_duration(model.worth_s) if model.worth_s else "",
                notes_text(model),
            )
            for model in models
        ]  # fmt: skip
        return _list(_MODELS, rows, count, overview.model_count, width, nothing="no model is known yet")

    def _leases(self, count: int, width: int) -> list[RenderableType]:
        overview = self.overview
        rows = [
            (
                lease.name, (lease.client.name or "worker") + ("" if lease.complete else " (waits)"),
                process_text(lease), format_duration(max(0.0, overview.time_s - lease.since_time_s)),
                format_size(lease.size_bytes),
            )
            for lease in overview.leases
        ]  # fmt: skip
        return _list(_LEASES, rows, count, overview.stats.lease_count, width, nothing="no worker holds a model")

    def _events(self, count: int, width: int) -> list[RenderableType]:
        rows = [
            (f"{datetime.fromtimestamp(event.time_s).astimezone():%H:%M:%S}", event.kind, event.message)
            for event in self.overview.events
        ]
        wrong = frozenset(number for number, row in enumerate(rows) if row[1] in WRONG)
        return _list(_EVENTS, rows, count, len(rows), width, nothing="nothing was decided yet", wrong=wrong)


def _level_bar(stats: LevelStats, use: LevelUse, width: int) -> Text:
    taken = stats.used_bytes + stats.reserved_bytes
    tail = f" {format_size(taken)} of {format_size(stats.capacity_bytes)}, {percent(taken, stats.capacity_bytes)} %"
    cells = max(10, min(width, 160) - 4 - len(tail))
    line = Text(f"{stats.level.value.upper()} ", "bold", no_wrap=True)
    for holding, count in _cells(use, cells).items():
        letter, style = MARKS[holding]
        line.append(letter * count, style)
    return line.append(tail, "not bold")


def _cells(use: LevelUse, cells: int) -> dict[Holding, int]:
    """How many cells of a bar each part gets: at least one of what is there, and all together exactly ``cells``."""
    there = {holding: size for holding in MARKS if (size := use.holdings_bytes.get(holding, 0)) > 0}
    whole = sum(there.values())
    if not whole:
        return {Holding.FREE: cells}
    found = {holding: max(1, round(cells * size / whole)) for holding, size in there.items()}
    found[max(found, key=lambda holding: found[holding])] += cells - sum(found.values())
    return found


def _legend(stats: LevelStats, use: LevelUse, width: int) -> list[RenderableType]:
    """What the cells mean, on as many lines as it takes; what limits the level where it fits."""
    items = [
        Text.assemble((letter, style), f" {holding.value} {format_size(size_bytes)}")
        for holding, (letter, style) in MARKS.items()
        if (size_bytes := use.holdings_bytes.get(holding, 0))
    ]
    items.append(Text(f"({clean(stats.limited_by)})", "dim"))
    lines = [Text("  ", no_wrap=True)]
    for item in items:
        if lines[-1].cell_len + item.cell_len + 1 > width and item is not items[-1]:
            lines.append(Text("  ", no_wrap=True))
        if lines[-1].cell_len + item.cell_len + 1 <= width:
            lines[-1].append(" ").append_text(item).append(" ")
    return [*lines]


def _move_line(move: Move, width: int) -> Text:
    """One below the other they make columns. On a narrow screen what has arrived is told by its share alone."""
    known = move.phase in {MovePhase.MOVING, MovePhase.WRITING, MovePhase.VERIFYING}
    done = percent(move.reached_bytes, move.goal_bytes) if known else 0
    bar = max(8, min(40, width // 6))
    told = speed_text(move) if move.phase is MovePhase.MOVING and width < _ROOMY else progress_text(move)
    shown = Text(no_wrap=True, overflow="ellipsis")
    name = Text(clean(move.name), "bold", no_wrap=True, overflow="ellipsis")
    name.truncate(max(14, min(40, width // 4 + 2)), overflow="ellipsis", pad=True)
    filled = bar * done // 100
    shown.append_text(name).append(f" {kind_text(move):13} ")
    shown.append("━" * filled, "bold green").append("─" * (bar - filled), "dim")
    return shown.append(f" {done:3} % " if known else "       ").append(told)


def _move_note(move: Move) -> Text:
    waiting = waiting_text(move)
    text = f"  from {source_text(move)}" + (f", waited for by {waiting}" if waiting else "")
    return Text(clean(text), "dim", no_wrap=True, overflow="ellipsis")


def _list(
    columns: Sequence[Column],
    rows: Sequence[Sequence[str]],
    count: int,
    total: int,
    width: int,
    *,
    nothing: str,
    wrong: frozenset[int] = frozenset(),
) -> list[RenderableType]:
    """A table of at most ``count`` lines with its heads, and how many more there are."""
    if not rows:
        return [Text(nothing, "dim")]
    shown = rows[: max(1, count - 1)] if total < count else rows[: max(1, count - 2)]
    cells = [[clean(cell) for cell in row] for row in shown]
    lines: list[RenderableType] = []
    widths = _widths(columns, cells, width)
    for number, row in enumerate(([column.head for column in columns], *cells)):
        style = "bold" if number == 0 else "red" if number - 1 in wrong else ""
        line = Text(style=style, no_wrap=True)
        for column, cell, cells_wide in zip(columns, row, widths, strict=True):
            if cells_wide:
                line.append_text(_fitted(cell, cells_wide, right=column.right)).append(" " * _GAP)
        line.rstrip()
        lines.append(line)
    return [*lines, *([Text(f"and {total - len(shown)} more", "dim")] if total > len(shown) else [])]


def _fitted(text: str, width: int, *, right: bool) -> Text:
    cell = Text(text, no_wrap=True)
    cell.truncate(width, overflow="ellipsis")
    missing = " " * (width - cell.cell_len)
    return Text(missing).append_text(cell) if right else cell.append(missing)


def _widths(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Of each column; 0 for one that is left out. Columns that may be cut are, the widest first."""
    found = [
        max(cell_len(text) for text in (column.head, *(row[number] for row in cells)))
        for number, column in enumerate(columns)
    ]
    least = [min(wide, _READABLE) if column.cut else wide for column, wide in zip(columns, found, strict=True)]
    for number in sorted(range(len(columns)), key=lambda number: -columns[number].spare):
        if columns[number].spare and sum(least) + _GAP * sum(map(bool, least)) - _GAP > width:
            found[number] = least[number] = 0
    while sum(found) + _GAP * sum(map(bool, found)) - _GAP > width:
        widest = max((number for number, column in enumerate(columns) if column.cut), key=lambda number: found[number])
        if found[widest] <= 1:
            break
        found[widest] -= 1
    return found


def _keys(choice: Choice) -> Text:
    line = Text(no_wrap=True)
    for key, what in (("q", "quit"), ("m", "models"), ("l", "leases"), ("e", "events"), ("s", f"sort: {choice.sort}")):
        line.append(f" {key} ", "reverse").append(f" {what}  ", "bold" if what == choice.view else "")
    return line
