"""What is where, what moves, and who holds what, at one moment. Immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from cached.level import Level
from cached.types import ColdStart, Event, LeaseInfo, ModelSummary, Stats


class Holding(StrEnum):
    """What the bytes of a level are, in the order in which bars show them. Each byte is exactly one of these."""

    PINNED = "pinned"
    HOT = "hot"
    WARM = "warm"
    AUTO = "auto"
    COLD = "cold"
    TRANSIENT = "transient"
    PARTIAL = "partial"
    WITHDRAWN = "withdrawn"
    POOL = "pool"
    RESERVED = "reserved"
    FREE = "free"


class MoveKind(StrEnum):
    """Why bytes move."""

    PULL = "pull"
    PROMOTE = "promote"
    CONFIRM = "confirm"
    WRITE = "write"


class MovePhase(StrEnum):
    """Where a move stands. ``WRITING``: it may be used already, and is being written to L2."""

    RESOLVING = "resolving"
    WAITING = "waiting"
    MOVING = "moving"
    VERIFYING = "verifying"
    WRITING = "writing"


@dataclass(frozen=True, slots=True)
class LevelUse:
    """A level's bytes by what they are; a blob of several models counts once, as what keeps it longest."""

    level: Level
    holdings_bytes: Mapping[Holding, int]
    leased_bytes: int = 0
    """Of models that some worker holds."""


@dataclass(frozen=True, slots=True)
class Move:
    """A model on its way to a level. Bytes that are done are verified. ``source``: the origin, where one is read.

    ``behind_bytes`` of ``behind_total_bytes``: what is written to L2 behind the arrival. ``speed_bytes_per_s``: of
    late, of what the phase is about; 0 while nothing arrives.
    """

    kind: MoveKind
    phase: MovePhase
    name: str
    revision: str
    level: Level
    source: str = ""
    total_bytes: int = 0
    done_bytes: int = 0
    behind_total_bytes: int = 0
    behind_bytes: int = 0
    speed_bytes_per_s: float = 0.0
    elapsed_s: float = 0.0
    waiting: tuple[str, ...] = ()
    """The first of the workers that wait for it."""
    waiting_count: int = 0
    partial: bool = False
    """Not all of the model was asked for."""

    @property
    def goal_bytes(self) -> int:
        """What its phase is to reach."""
        return self.behind_total_bytes if self.phase is MovePhase.WRITING else self.total_bytes

    @property
    def reached_bytes(self) -> int:
        """How far its phase is."""
        return self.behind_bytes if self.phase is MovePhase.WRITING else self.done_bytes

    @property
    def remaining_s(self) -> float | None:
        """How long it still takes at this speed; None while that cannot be said."""
        left_bytes = self.goal_bytes - self.reached_bytes
        if self.phase not in {MovePhase.MOVING, MovePhase.WRITING} or self.speed_bytes_per_s <= 0:
            return None
        return left_bytes / self.speed_bytes_per_s


@dataclass(frozen=True, slots=True)
class Problem:
    """What does not work as it should. ``about``: the place of a degraded part, or ``model``, which ``name`` tells."""

    about: str
    message: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much an overview holds at most, so that it fits a screen and costs the daemon little."""

    models: int = 200
    leases: int = 40
    events: int = 50
    moves: int = 20
    cold_starts: int = 8


@dataclass(frozen=True, slots=True)
class Overview:
    """One moment. ``model_count``, ``move_count`` and those of ``stats`` tell how many there are beside what is listed.

    ``models``: those that move or have failed first, then by where they are, then by name; without compile artifacts.
    ``moves``: the oldest first. ``leases``: those that still load first, then the latest. ``events``: the latest
    first, without leases that came and went. ``cold_starts``: of all models, the latest first.
    """

    time_s: float
    stats: Stats
    uses: tuple[LevelUse, ...] = ()
    models: tuple[ModelSummary, ...] = ()
    model_count: int = 0
    moves: tuple[Move, ...] = ()
    move_count: int = 0
    leases: tuple[LeaseInfo, ...] = ()
    events: tuple[Event, ...] = ()
    cold_starts: tuple[ColdStart, ...] = ()
    problems: tuple[Problem, ...] = field(default=())
