"""What the status page says, as plain text and numbers: made of an overview, and put into HTML elsewhere. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cached.overview import Holding, LevelUse, Move, MovePhase, Overview, Problem, words
from cached.types import Event, LeaseInfo, LevelStats, ModelSummary
from cached.units import format_duration, format_size
from cached.web.chart import Start, starts_of

_PLACES = {"l1": "shared memory", "l2": "local disk"}
_LONGEST = 400
"""Characters of a message; the whole of it is in the log and in `cached events`."""
_NARROW_PX, _MARGIN_PX, _LETTER_PX = 360, 14, 6.9
"""A narrow bar, and what text takes of it: a part has its word in it only where all of that can be read."""
_THINNEST = 0.5
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a level's bar; positions in percent of it."""

    key: str
    meaning: str
    size: str
    percent: str
    begin: float
    width: float
    label: str


@dataclass(frozen=True, slots=True)
class LevelView:
    """A level's bar with what it means. ``parts`` leaves out what is nothing."""

    key: str
    name: str
    place: str
    taken: str
    capacity: str
    percent: int
    limited_by: str
    parts: tuple[Part, ...]
    notes: tuple[str, ...]
    told: str
    """The whole bar in a sentence, for who does not see it."""


@dataclass(frozen=True, slots=True)
class MoveView:
    """Something that moves. ``percent`` is None while that cannot be said."""

    name: str
    kind: str
    state: str
    source: str
    waiting: str
    percent: int | None
    behind: str


@dataclass(frozen=True, slots=True)
class ModelView:
    """A row of the table of models."""

    name: str
    state: str
    where: str
    """``l1``, ``l2``, ``moving``, ``bad`` or ``none``."""
    tier: str
    whose: str
    size: str
    l1: str
    l2: str
    leases: str
    idle: str
    worth: str
    notes: str


@dataclass(frozen=True, slots=True)
class LeaseView:
    """A row of the table of leases."""

    model: str
    client: str
    process: str
    held: str
    mapped: str
    loading: bool


@dataclass(frozen=True, slots=True)
class EventView:
    """A line of the list of decisions. ``iso``: where the time alone does not tell which day it was."""

    iso: str
    time: str
    kind: str
    wrong: bool
    message: str


@dataclass(frozen=True, slots=True)
class ProblemView:
    """What needs attention, what to do, and where more of that is written."""

    what: str
    do: str
    runbook: str


@dataclass(frozen=True, slots=True)
class View:
    """The whole page. ``state``: ``ok``, ``degraded``, ``passing`` or ``down``; ``state_text``: the same in a word."""

    host: str
    state: str
    state_text: str
    facts: tuple[str, ...]
    iso: str
    time: str
    reasons: tuple[str, ...] = ()
    problems: tuple[ProblemView, ...] = ()
    levels: tuple[LevelView, ...] = ()
    moves: tuple[MoveView, ...] = ()
    more_moves: int = 0
    models: tuple[ModelView, ...] = ()
    more_models: int = 0
    leases: tuple[LeaseView, ...] = ()
    lease_count: int = 0
    more_leases: int = 0
    model_count: int = 0
    events: tuple[EventView, ...] = ()
    starts: tuple[Start, ...] = ()
    shown: bool = True
    """False while there is nothing to look at yet: the daemon has not read what it holds."""


def view_of(overview: Overview | None, reasons: Sequence[str], *, host: str, now_s: float) -> View:
    """``reasons``: why the daemon is not ready. ``overview`` is None while it does not know what it has."""
    local = datetime.fromtimestamp(now_s).astimezone()
    iso, clock = local.isoformat(timespec="seconds"), f"{local:%H:%M:%S}"
    if overview is None:
        state, state_text = _state(reasons, ())
        return View(host, state, state_text, (), iso, clock, reasons=_capitals(reasons), shown=False)
    stats = overview.stats
    state, state_text = _state(reasons, overview.problems)
    return View(
        host=host,
        state=state,
        state_text=state_text,
        facts=(f"version {stats.version}", f"up {format_duration(stats.uptime_s)}", _movers(stats.mover_count)),
        iso=iso,
        time=clock,
        reasons=_capitals(reasons),
        problems=tuple(map(_problem, overview.problems)),
        levels=tuple(_level(level, use) for level, use in zip(stats.levels, overview.uses, strict=True)),
        moves=tuple(map(_move, overview.moves)),
        more_moves=overview.move_count - len(overview.moves),
        models=tuple(_model(model, overview.time_s) for model in overview.models),
        more_models=overview.model_count - len(overview.models),
        model_count=overview.model_count,
        leases=tuple(_lease(lease, overview.time_s) for lease in overview.leases),
        lease_count=stats.lease_count,
        more_leases=stats.lease_count - len(overview.leases),
        events=tuple(_event(event, overview.time_s) for event in overview.events),
        starts=starts_of(overview.cold_starts, overview.time_s),
    )


def _state(reasons: Sequence[str], problems: Sequence[Problem]) -> tuple[str, str]:
    if reasons:
        word = reasons[0].removeprefix("the daemon is ")
        return ("passing", word) if word in {"starting", "draining"} else ("down", "not ready")
    if problems:
        return "degraded", "degraded" if any(item.about != "model" for item in problems) else "needs attention"
    return "ok", "all is well"


def _capitals(reasons: Iterable[str]) -> tuple[str, ...]:
    return tuple(reason[:1].upper() + reason[1:] for reason in reasons)


def _movers(count: int) -> str:
    return f"{count} mover{'' if count == 1 else 's'}"


def _problem(problem: Problem) -> ProblemView:
    advice = words.advice(problem)
    what = f"{problem.name}: {problem.message}" if problem.name else problem.message
    return ProblemView(_short(what if problem.name else _capitals([what])[0]), advice.text, advice.runbook)


def _level(stats: LevelStats, use: LevelUse) -> LevelView:
    name, capacity = stats.level.value.upper(), stats.capacity_bytes
    taken = stats.used_bytes + stats.reserved_bytes
    parts = tuple(_parts(use.holdings_bytes, max(capacity, taken)))
    said = ", ".join(f"{part.key} {part.size}" for part in parts) or "nothing"
    notes = [f"{format_size(use.leased_bytes)} held by workers"] if use.leased_bytes else []
    if stats.hot_capacity_bytes:
        notes.append(f"hot models have {format_size(stats.hot_bytes)} of {format_size(stats.hot_capacity_bytes)}")
    notes.append(f"{stats.blob_count} blob{'' if stats.blob_count == 1 else 's'}")
    return LevelView(
        key=stats.level.value,
        name=name,
        place=_PLACES.get(stats.level.value, ""),
        taken=format_size(taken),
        capacity=format_size(capacity),
        percent=words.percent(taken, capacity),
        limited_by=stats.limited_by,
        parts=parts,
        notes=tuple(notes),
        told=f"{name} has {format_size(capacity)}: {said}",
    )


def _parts(holdings: Mapping[Holding, int], whole_bytes: int) -> Iterable[Part]:
    begin = 0.0
    for holding, meaning in words.HOLDINGS.items():
        size_bytes = holdings.get(holding, 0)
        if size_bytes <= 0 or whole_bytes <= 0:
            continue
        share = 100 * size_bytes / whole_bytes
        size = format_size(size_bytes)
        labels = (f"{holding.value} {size}", holding.value, "")
        percent = f"{share:.0f} %" if share >= 1 else "< 1 %"
        width = max(share, _THINNEST)
        yield Part(
            holding.value, meaning, size, percent, round(begin, 2), round(width, 2),
            next(label for label in labels if not label or _fits(label, share)),
        )  # fmt: skip
        begin += share


def _fits(label: str, share: float) -> bool:
    return _MARGIN_PX + _LETTER_PX * len(label) <= share / 100 * _NARROW_PX


def _move(move: Move) -> MoveView:
    asked = move.phase not in {MovePhase.RESOLVING, MovePhase.WAITING}
    behind = ""
    if move.behind_total_bytes and move.phase in {MovePhase.MOVING, MovePhase.VERIFYING}:
        behind = f"L2 {words.percent(move.behind_bytes, move.behind_total_bytes)} % written"
    return MoveView(
        name=move.name + (" (a part)" if move.partial else ""),
        kind=words.kind_text(move),
        state=words.progress_text(move),
        source=_short(words.source_text(move)),
        waiting=_short(words.waiting_text(move)),
        percent=words.percent(move.reached_bytes, move.goal_bytes) if asked else None,
        behind=behind,
    )


_WHERE = {"quarantined": "bad", "pulling": "moving", "partial": "moving", "absent": "none"}


def _model(model: ModelSummary, now_s: float) -> ModelView:
    level = words.level_of(model)
    return ModelView(
        name=model.name,
        state=words.state_text(model),
        where=level.value if level else _WHERE.get(model.state.value, "none"),
        tier=model.tier.value,
        whose=model.tier_from,
        size=_size(model.size_bytes),
        l1=_share(model.l1_bytes, model.size_bytes),
        l2=_share(model.l2_bytes, model.size_bytes),
        leases=str(model.lease_count or ""),
        idle=words.idle_text(model, now_s),
        worth=format_duration(model.worth_s) if model.worth_s else "",
        notes=words.notes_text(model),
    )


def _share(held_bytes: int, size_bytes: int) -> str:
    return "all" if 0 < size_bytes <= held_bytes else _size(held_bytes)


def _size(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else ""


def _lease(lease: LeaseInfo, now_s: float) -> LeaseView:
    return LeaseView(
        model=lease.name,
        client=_short(lease.client.name or "worker", 60),
        process=words.process_text(lease),
        held=format_duration(max(0.0, now_s - lease.since_time_s)),
        mapped=_size(lease.size_bytes),
        loading=not lease.complete,
    )


def _event(event: Event, now_s: float) -> EventView:
    when = datetime.fromtimestamp(event.time_s).astimezone()
    named = event.name and event.name not in event.message
    lately = now_s - event.time_s < _DAY_S
    return EventView(
        iso="" if lately else when.isoformat(timespec="seconds"),
        time=f"{when:%H:%M:%S}" if lately else f"{when:%b %d %H:%M}",
        kind=event.kind,
        wrong=event.kind in words.WRONG,
        message=_short(f"{event.name}: {event.message}" if named else event.message),
    )


def _short(text: str, longest: int = _LONGEST) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
