"""cached coldstart: how workers' starts with a model went, phase by phase, and what got slower."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from cached.cli.connect import Globals, connected, pass_globals, ref_argument
from cached.cli.output import ago, clean, output_option, print_json, print_table, say, to_data
from cached.errors import InvalidRequestError
from cached_client._proto import cached_pb2 as pb
from cached_client.coldstart.breakdown import Breakdown, breakdown
from cached_client.coldstart.message import spans_of
from cached_client.coldstart.picture import chart, seconds, svg, table

_CHART_COLUMNS = 100
_LATELY = 5
_LEAST = 4
_SLOWER = 1.2
_SLOWER_S = 0.1


@dataclass(frozen=True, slots=True)
class Change:
    """A phase (``whole start``: all of it) before and lately, as medians in seconds."""

    phase: str
    before_s: float
    lately_s: float

    @property
    def slower(self) -> bool:
        """By a fifth, and by what anybody notices."""
        return self.lately_s > self.before_s * _SLOWER and self.lately_s - self.before_s > _SLOWER_S


@dataclass(frozen=True, slots=True)
class Trend:
    """The last starts against those before them. Only such as came from the same level as the last one."""

    from_level: str
    lately_count: int
    before_count: int
    changes: tuple[Change, ...] = ()
    """Empty with too few starts to compare."""


@click.command(short_help="Show where the time of workers' starts went.")
@ref_argument
@click.option(
    "-n", "count", type=click.IntRange(1, 1000), default=10, show_default=True, help="List the last N starts."
)
@click.option("--svg", "picture", type=click.Path(path_type=Path), help="Also write a picture of the last one there.")
@output_option
@pass_globals
def coldstart(options: Globals, ref: str, count: int, picture: Path | None, output: str) -> None:
    """Show how workers' starts with a model went: the phases of the last one, the last N, and the trend.

    Workers tell of their starts by cached_client.coldstart. CRITICAL is what the end waited for, and HIDDEN what ran
    beside something that took longer: only what is critical makes a start faster when it gets faster. The trend
    compares medians of the last starts with those of the ones before, among starts that came from the same level.

    \b
    Examples:
      cached coldstart llama-13b
      cached coldstart llama-13b -n 50 -o json
      cached coldstart llama-13b --svg start.svg
    """  # noqa: D301 click reads the control character
    with connected(options) as cache:
        starts = list(cache.call(cache.stub.ListColdStarts, pb.ListColdStartsRequest(ref=ref)).cold_starts)
    found = [breakdown(spans_of(start), start.total_s) for start in starts]
    trend = _trend(starts, found)
    if picture is not None and starts:
        _write(picture, svg(found[-1], f"Cold start of {starts[-1].name}"))
    if output == "json":
        shown = [_data(*pair) for pair in zip(starts[-count:], found[-count:], strict=True)]
        print_json({"name": ref, "starts": shown, "trend": asdict(trend) if trend else None})
        return
    if not starts:
        say(f"no worker has told of a start with {ref} yet; see Timeline.report in docs/coldstart.md")
        return
    _print_last(starts[-1], found[-1])
    _print_starts(starts[-count:], found[-count:])
    if trend is not None:
        _print_trend(trend)


def _write(picture: Path, text: str) -> None:
    try:
        picture.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequestError(
            f"the picture cannot be written to {picture}: {error.strerror}",
            hint="name a file in a folder where this user may write",
            value=picture,
        ) from error


def _data(start: pb.ColdStart, found: Breakdown) -> dict[str, Any]:
    rows = [{**asdict(row), "hidden_s": row.hidden_s} for row in found.rows]
    for phase, message in zip(phases := to_data(start)["phases"], start.phases, strict=True):
        phase["parent"] = message.parent if message.HasField("parent") else None
    return {**to_data(start), "phases": phases, "unaccounted_s": found.unaccounted_s, "rows": rows}


def _print_last(start: pb.ColdStart, found: Breakdown) -> None:
    labels = ", ".join(f"{key} {value}" for key, value in sorted(start.labels.items()))
    who = start.client_name or "a worker"
    click.echo(clean(f"{start.name}: {who} started in {seconds(start.total_s)}, {ago(start.reported_time_s)}"))
    if labels:
        click.echo(clean(labels))
    click.echo(f"\n{table(found)}\n")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _CHART_COLUMNS
    click.echo(chart(found, width, ascii_only=not (sys.stdout.encoding or "").lower().startswith("utf")))


def _print_starts(starts: Sequence[pb.ColdStart], found: Sequence[Breakdown]) -> None:
    rows = [
        (ago(start.reported_time_s), start.client_name or "-", start.labels.get("from_level", "-"),
         seconds(start.total_s), _longest(parts))
        for start, parts in zip(starts, found, strict=True)
    ]  # fmt: skip
    click.echo()
    print_table(("START", "CLIENT", "FROM", "TOTAL", "WAITED MOST FOR"), rows, right=("TOTAL",), folding=("CLIENT",))


def _longest(found: Breakdown) -> str:
    rows = sorted((row for row in found.rows if not row.depth), key=lambda row: -row.waited_s)[:3]
    return ", ".join(f"{row.name} {seconds(row.waited_s)}" for row in rows if row.waited_s > 0) or "-"


def _trend(starts: Sequence[pb.ColdStart], found: Sequence[Breakdown]) -> Trend | None:
    """None without any start."""
    if not starts:
        return None
    level = starts[-1].labels.get("from_level", "")
    like = [_by_phase(parts) for start, parts in zip(starts, found, strict=True)
            if start.labels.get("from_level", "") == level]  # fmt: skip
    lately_count = min(_LATELY, len(like) // 2)
    before, lately = like[: len(like) - lately_count], like[len(like) - lately_count :]
    if len(like) < _LEAST:
        return Trend(level, lately_count, len(before))
    names = dict.fromkeys(name for phases in (*lately, *before) for name in phases)
    changes = (
        Change(name, _median(before, name), _median(lately, name))
        for name in names
        if any(name in phases for phases in before) and any(name in phases for phases in lately)
    )
    return Trend(level, lately_count, len(before), tuple(changes))


def _by_phase(found: Breakdown) -> dict[str, float]:
    phases = {"whole start": found.total_s}
    for row in found.rows:
        phases.setdefault(row.name, row.total_s)
    return phases


def _median(starts: Sequence[dict[str, float]], name: str) -> float:
    return statistics.median(phases[name] for phases in starts if name in phases)


def _print_trend(trend: Trend) -> None:
    like = f" from {trend.from_level}" if trend.from_level else ""
    if not trend.changes:
        click.echo(f"\nNo trend yet: {_LEAST} starts{like} are needed.")
        return
    click.echo(f"\nMedian of the last {trend.lately_count} starts{like} against the {trend.before_count} before:")
    rows = [
        (change.phase, seconds(change.before_s), seconds(change.lately_s), _change(change), "slower" * change.slower)
        for change in trend.changes
    ]
    print_table(("PHASE", "BEFORE", "LATELY", "CHANGE", ""), rows, right=("BEFORE", "LATELY", "CHANGE"))


def _change(change: Change) -> str:
    return f"{change.lately_s / change.before_s - 1:+.0%}" if change.before_s > 0 else "-"
