"""What a check is, and what it finds. A new one is a function, and a line in ``command.CHECKS``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from cached.cli.connect import Globals
from cached.errors import CachedError
from cached_client.errors import CacheError


class Verdict(StrEnum):
    """How a check ends."""

    OK = "ok"
    ADVICE = "advice"
    PROBLEM = "problem"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    ``told``: a sentence for people. ``measured``: figures by name, in the unit that ends the name. ``mend``: the
    command, or the line of configuration, that helps; empty where nothing is to be done.
    """

    verdict: Verdict
    told: str
    measured: Mapping[str, float] = field(default_factory=dict)
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """What checks are given."""

    options: Globals
    socket: str
    python: str
    """The workers' interpreter."""
    environment: Mapping[str, str]
    """What workers are taken to be started with."""
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    shm: Path = Path("/dev/shm")  # noqa: S108 the mount of L1, not a temporary file


@dataclass(frozen=True, slots=True)
class Check:
    """One check. ``experiment``: it runs something for seconds, instead of looking."""

    name: str
    about: str
    look: Callable[[Context], Iterable[Finding]]
    experiment: bool = False


def run_checks(checks: Sequence[Check], context: Context) -> Iterator[tuple[Check, Finding]]:
    """Each finding as it is made. A check that cannot be carried out says why, and does not end the others."""
    for check in checks:
        try:
            for finding in check.look(context):
                yield check, finding
        except (OSError, ValueError, CachedError, CacheError) as error:
            yield check, Finding(Verdict.NOT_MEASURED, f"this check could not be carried out: {error}")
