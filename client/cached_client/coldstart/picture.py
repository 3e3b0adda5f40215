"""A breakdown for people: a table, bars of text, and one SVG document."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cached_client.coldstart.breakdown import Breakdown, Interval, Row

_HEADS = ("PHASE", "START", "TOTAL", "SELF", "CRITICAL", "HIDDEN")
_BARS = {False: ("█", "░"), True: ("#", ".")}
_LEAST_BAR = 20
_STEPS = (1, 2, 5)


def seconds(value: float) -> str:
    """``12 ms``, ``1.23 s``, ``2m05s``; ``-`` for nothing."""
    if value < 0.0005:
        return "-"
    if value < 0.9995:
        return f"{value * 1000:.0f} ms"
    if value < 120:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes}m{rest:02d}s"


def table(found: Breakdown) -> str:
    """One line for each row; the column CRITICAL adds up to the whole."""
    rows = [
        (
            _title(row),
            f"{row.start_s:.2f} s",
            seconds(row.total_s),
            seconds(row.self_s),
            seconds(row.critical_s),
            seconds(row.hidden_s),
        )
        for row in found.rows
    ]
    if found.unaccounted_s >= 0.0005:
        rows.append(("(no phase)", "", "", "", seconds(found.unaccounted_s), ""))
    rows.append(("whole start", "", seconds(found.total_s), "", seconds(found.total_s), ""))
    return aligned((_HEADS, *rows))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns side by side: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = (
        "  ".join(cell.ljust(width) if column == 0 else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def chart(found: Breakdown, width: int = 100, *, ascii_only: bool = False) -> str:
    """Bars over a common time: solid where the end waited for it, light where it ran beside something longer."""
    titles = [_title(row) for row in found.rows]
    left = max((len(title) for title in titles), default=0) + 2
    times = [seconds(row.total_s) for row in found.rows]
    right = max((len(text) for text in times), default=0)
    columns = max(_LEAST_BAR, width - left - right - 2)
    scale = columns / found.total_s if found.total_s > 0 else 0.0
    lines = [
        f"{title:<{left}}{_bar(row, columns, scale, ascii_only=ascii_only):<{columns}}  {text:>{right}}".rstrip()
        for title, row, text in zip(titles, found.rows, times, strict=True)
    ]
    return "\n".join([*lines, " " * left + _axis(found.total_s, columns, scale)])


def _bar(row: Row, columns: int, scale: float, *, ascii_only: bool) -> str:
    solid, light = _BARS[ascii_only]
    cells = [" "] * columns
    for mark, intervals in ((light, row.intervals), (solid, row.critical)):
        for begin, end in _cells(intervals, columns, scale):
            cells[begin:end] = mark * (end - begin)
    return "".join(cells)


def _cells(intervals: Iterable[Interval], columns: int, scale: float) -> Iterable[tuple[int, int]]:
    """Each at least one column wide, and within them."""
    for begin_s, end_s in intervals:
        begin = min(int(begin_s * scale), columns - 1)
        yield begin, max(begin + 1, min(columns, round(end_s * scale)))


def _axis(total_s: float, columns: int, scale: float) -> str:
    line = [" "] * (columns + 12)
    at = 0
    for tick_s in _ticks(total_s):
        begin, text = round(tick_s * scale), f"{tick_s:g} s" if tick_s else "0"
        if begin >= at:
            line[begin : begin + len(text)] = text
            at = begin + len(text) + 1
    return "".join(line).rstrip()


def _ticks(total_s: float, wanted: int = 6) -> list[float]:
    """Round numbers from 0 to the end, about so many."""
    if total_s <= 0:
        return [0.0]
    step_s = 1e-6
    while total_s / step_s > wanted:
        step_s = next((base * step_s for base in _STEPS[1:] if total_s / (base * step_s) <= wanted), 10 * step_s)
    return [round(number * step_s, 9) for number in range(int(total_s / step_s) + 1)]


def _title(row: Row) -> str:
    marks = f" x{row.count}" if row.count > 1 else ""
    marks += " (running)" if row.running else ""
    marks += " (failed)" if row.failed else ""
    return "  " * row.depth + row.name + marks


# Sizes of the SVG, in pixels.
_ROW, _LEFT, _BAR, _RIGHT, _TOP = 24, 240, 640, 90, 44


def svg(found: Breakdown, title: str) -> str:
    """Dark where the end waited for it, light where it ran beside something longer."""
    scale = _BAR / found.total_s if found.total_s > 0 else 0.0
    bottom = _TOP + _ROW * len(found.rows)
    width, height = _LEFT + _BAR + _RIGHT, bottom + 34
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="13" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="24" font-size="15" font-weight="bold">{escape(title)}, {seconds(found.total_s)}</text>',
    ]
    for tick_s in _ticks(found.total_s):
        x = _LEFT + tick_s * scale
        parts.append(f'<line x1="{x:.1f}" y1="{_TOP}" x2="{x:.1f}" y2="{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle" fill="#555555">{tick_s:g} s</text>')
    for number, row in enumerate(found.rows):
        parts += _svg_row(row, _TOP + _ROW * number, scale)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _svg_row(row: Row, y: int, scale: float) -> list[str]:
    told = f"{_title(row).strip()}: {seconds(row.total_s)}, {seconds(row.critical_s)} of it on the critical path"
    parts = [f"<g><title>{escape(told)}</title>"]
    parts.append(f'<text x="{12 + 14 * row.depth}" y="{y + 16}">{escape(_title(row).strip())}</text>')
    for colour, intervals in (("#b9cfe8", row.intervals), ("#1f5fa8", row.critical)):
        for begin_s, end_s in intervals:
            x, width = _LEFT + begin_s * scale, max(1.0, (end_s - begin_s) * scale)
            parts.append(f'<rect x="{x:.1f}" y="{y + 4}" width="{width:.1f}" height="{_ROW - 8}" fill="{colour}"/>')
    parts.append(f'<text x="{_LEFT + _BAR + 8}" y="{y + 16}">{seconds(row.total_s)}</text></g>')
    return parts
