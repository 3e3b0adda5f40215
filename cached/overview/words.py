"""The words for an overview, the same on the status page and in a terminal. Plain text: each edge escapes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cached.failures import OTHER, PARTS
from cached.level import Level
from cached.overview.values import Holding, Move, MoveKind, MovePhase, Problem
from cached.types import LeaseInfo, ModelSummary, RevisionState
from cached.units import format_duration, format_rate, format_size

HOLDINGS: Mapping[Holding, str] = {
    Holding.PINNED: "never evicted",
    Holding.HOT: "always in L1",
    Holding.WARM: "stays while it earns its place",
    Holding.AUTO: "its tier is computed from demand",
    Holding.COLD: "first to go",
    Holding.TRANSIENT: "beside the budget, goes with its last lease",
    Holding.PARTIAL: "parts of models",
    Holding.WITHDRAWN: "evicted, but some process still maps it",
    Holding.POOL: "cleared memory, ready for the next load",
    Holding.RESERVED: "promised to what is arriving",
    Holding.FREE: "not taken",
}
"""What each part of a level's bar means."""

WRONG = frozenset(
    {
        "artifact.upload_failed", "background.failed", "catalog.refused", "config.refused", "damage.found",
        "degraded.began", "descriptors.accept_failed", "front.accept_failed", "http.accept_failed", "internal.error",
        "l1.lost", "l2.lost", "l2.skipped", "l2.write_failed", "load.failed", "mover.died",
    }
)  # fmt: skip
"""Kinds of events that tell of a failure."""

_KINDS = {
    MoveKind.PULL: "pull to {level}",
    MoveKind.PROMOTE: "promote to L1",
    MoveKind.CONFIRM: "confirm in {level}",
    MoveKind.WRITE: "write to L2",
}
_STATES = {
    RevisionState.PULLING: "arriving",
    RevisionState.READY: "ready",
    RevisionState.QUARANTINED: "quarantined",
    RevisionState.ABSENT: "not here",
    RevisionState.PARTIAL: "in part",
}


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do about a problem, and the heading of docs/operations.md that has more of it."""

    text: str
    runbook: str


_OF_A_MODEL = Advice(
    "cached show {name} has the whole error; cached pull {name} tries again.", "A model cannot be brought"
)


def clean(text: str, *, lines: bool = False) -> str:
    """Text from elsewhere, without what would command a terminal or turn a line; ``lines`` keeps line feeds."""
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(char if char.isprintable() or char in kept else "\N{REPLACEMENT CHARACTER}" for char in text)


def advice(problem: Problem) -> Advice:
    """What to do about it."""
    if problem.about == "model":
        return Advice(_OF_A_MODEL.text.replace("{name}", problem.name), _OF_A_MODEL.runbook)
    part = PARTS.get(problem.about, PARTS[OTHER])
    return Advice(part.advice, part.runbook)


def kind_text(move: Move) -> str:
    """``pull to L1``."""
    return _KINDS[move.kind].format(level=move.level.value.upper())


def percent(part: float, whole: float) -> int:
    """Rounded down, so that 100 means all of it; 0 of nothing."""
    return min(100, int(100 * part / whole)) if whole > 0 else 0


def progress_text(move: Move) -> str:
    """How far, how fast, how long: ``1.2 GiB of 4.8 GiB, 412.0 MB/s, 9.1 s left``; or what it waits for."""
    match move.phase:
        case MovePhase.RESOLVING:
            return "asking the origin what it has"
        case MovePhase.WAITING:
            return f"{format_size(move.total_bytes)}, waits for its turn or for room"
        case MovePhase.VERIFYING:
            return f"{format_size(move.total_bytes)}, all here; checking the whole"
        case MovePhase.MOVING | MovePhase.WRITING:
            parts = [f"{format_size(move.reached_bytes)} of {format_size(move.goal_bytes)}", speed_text(move)]
            if move.phase is MovePhase.WRITING and move.kind is not MoveKind.WRITE:
                parts[0] = f"usable; written to L2: {parts[0]}"
            return ", ".join(part for part in parts if part)


def speed_text(move: Move) -> str:
    """``412.0 MB/s, 9.1 s left``; ``stalled`` where nothing arrives though it should."""
    if move.phase not in {MovePhase.MOVING, MovePhase.WRITING}:
        return ""
    remaining_s = move.remaining_s
    if remaining_s is None:
        return "nothing verified lately" if move.elapsed_s > 1 else ""
    return f"{format_rate(move.speed_bytes_per_s)}, {format_duration(remaining_s)} left"


def source_text(move: Move) -> str:
    """Where its bytes come from."""
    if move.kind is MoveKind.PULL:
        return move.source or "its origin"
    return {MoveKind.PROMOTE: "L2", MoveKind.CONFIRM: "an earlier daemon", MoveKind.WRITE: "L1"}[move.kind]


def waiting_text(move: Move) -> str:
    """``vllm (pid 7) and 2 more``; empty where nobody waits."""
    if not move.waiting:
        return ""
    more = move.waiting_count - len(move.waiting)
    return ", ".join(move.waiting) + (f" and {more} more" if more > 0 else "")


def state_text(model: ModelSummary) -> str:
    """``ready in L1``."""
    text = _STATES[model.state]
    if model.state is RevisionState.READY:
        where = "L1" if model.l1_bytes >= model.size_bytes else "L2"
        return f"ready in {where}, {int(100 * model.progress)} %" if 0 < model.progress < 1 else f"ready in {where}"
    if model.state in {RevisionState.PULLING, RevisionState.PARTIAL} and 0 < model.progress < 1:
        return f"{text}, {int(100 * model.progress)} %"
    return text


def level_of(model: ModelSummary) -> Level | None:
    """The nearest level that has all of it."""
    if model.state is not RevisionState.READY:
        return None
    return Level.L1 if model.l1_bytes >= model.size_bytes else Level.L2


def idle_text(model: ModelSummary, now_s: float) -> str:
    """How long no worker has had it."""
    if model.lease_count:
        return "in use"
    return format_duration(max(0.0, now_s - model.last_used_time_s)) if model.last_used_time_s else "never used"


def notes_text(model: ModelSummary) -> str:
    """What else there is to say of it."""
    notes = [
        ("pinned", model.pinned), ("transient", model.transient), (f"adapter of {model.base}", model.base),
        (f"tenant {model.tenant}", model.tenant), (f"priority {model.priority}", model.priority),
    ]  # fmt: skip
    return ", ".join(note for note, holds in notes if holds)


def process_text(lease: LeaseInfo) -> str:
    """Which process it is, by the kernel's word: ``python3 in pod 1c7f9e0b, pid 4242, uid 1000``.

    By its own word, ``pid 4242 by its own word``, until it fetched descriptors, or where the kernel tells no pid: it
    runs in a PID namespace that the daemon does not see.
    """
    peer, claimed = lease.peer, lease.client.pid
    told = [" in ".join(part for part in (peer.process, peer.container) if part)] if peer else []
    if peer is not None and peer.pid > 0:
        told.append(f"pid {peer.pid}")
    elif claimed:
        told.append(f"pid {claimed} by its own word")
    if peer is not None:
        told.append(f"uid {peer.uid}")
    return ", ".join(part for part in told if part)
