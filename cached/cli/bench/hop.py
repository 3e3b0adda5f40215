"""What a hop is, and how what was measured of it compares with what was to be expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cached.cli.measure.scratch import Span
from cached.config import Config
from cached.origins.base import OriginSpec


class Outcome(StrEnum):
    """How a hop compares."""

    EXPECTED = "as expected"
    SLOWER = "slower"
    UNKNOWN = "measured"
    """Nothing is known of what it should be."""
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Expectation:
    """``least``: below it something is wrong. ``shown``: what is usual, and by whose word. Of ``unit``."""

    least: float
    shown: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure: ``value`` in ``unit`` (``GB/s`` or ``ms``); ``more``: further ones by name.

    ``reasons``: what usually makes it slower than expected. ``check``: the check of `cached doctor` that tells more.
    """

    hop: str
    about: str
    outcome: Outcome
    value: float = 0.0
    unit: str = "GB/s"
    cpu_s_per_gb: float | None = None
    expected: Expectation | None = None
    note: str = ""
    reasons: str = ""
    check: str = ""
    more: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Setting:
    """What hops are given. ``spec``: the origin to fetch from; None where none is known, and ``no_spec`` says why."""

    config: Config
    socket: str
    python: str
    size_bytes: int
    quick: bool
    spec: OriginSpec | None
    no_spec: str
    environment: Mapping[str, str]
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")


def judged(
    hop: str,
    about: str,
    span: Span,
    expected: Expectation | None,
    *,
    reasons: str = "",
    check: str = "",
    note: str = "",
) -> Measured:
    """A rate beside what was to be expected of it."""
    outcome = Outcome.UNKNOWN
    if expected is not None:
        outcome = Outcome.EXPECTED if span.gb_per_s >= expected.least else Outcome.SLOWER
    return Measured(
        hop, about, outcome, span.gb_per_s, "GB/s", span.cpu_s_per_gb, expected, note, reasons, check,
        {"size_bytes": float(span.size_bytes), "seconds": span.seconds},
    )  # fmt: skip


def judged_ms(
    hop: str, about: str, value_ms: float, expected: Expectation, *, reasons: str = "", check: str = "", note: str = ""
) -> Measured:
    """A time beside what was to be expected of it: here ``least`` is the most that is well."""
    outcome = Outcome.EXPECTED if value_ms <= expected.least else Outcome.SLOWER
    return Measured(hop, about, outcome, value_ms, "ms", None, expected, note, reasons, check)


def not_measured(hop: str, about: str, why: str) -> Measured:
    """A hop that could not be measured, or that is not there."""
    return Measured(hop, about, Outcome.NOT_MEASURED, note=why)
