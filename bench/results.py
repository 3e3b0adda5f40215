"""What a benchmark found, as JSON keeps it: samples, contests, tables and requirements. Standard library only.

Written by ``python -m bench``, read back by ``docs/generate.py``. Sizes are bytes, durations seconds, a GB is 10^9
bytes.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

SCHEMA = 1
"""Of the files; one of another number is not read."""

FOLDER = Path(__file__).resolve().parent / "results"
"""Where results are kept."""


class Unavailable(Exception):  # noqa: N818 - nothing went wrong
    """What is missing on this machine, so that a part or a contestant cannot be measured. Its text is the reason."""


class Role(StrEnum):
    """What a contestant is in its contest."""

    OURS = "ours"
    PEER = "peer"
    LIMIT = "limit"


@dataclass(frozen=True, slots=True)
class Sample:
    """One measured run.

    ``cpu_s`` is user and system time of all processes on the reader's side until the content is ready, ``later_cpu_s``
    what they spent for it afterwards, ``server_cpu_s`` what the server spent. ``extra`` holds figures of one contest.
    """

    seconds: float
    size_bytes: int
    cpu_s: float
    later_cpu_s: float = 0.0
    server_cpu_s: float = 0.0
    extra: dict[str, float] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """Rate."""
        return self.size_bytes / 1e9 / self.seconds

    @property
    def cpu_s_per_gb(self) -> float:
        """Processor time until ready for each GB."""
        return self.cpu_s / (self.size_bytes / 1e9)

    @property
    def total_cpu_s_per_gb(self) -> float:
        """The same, with what was spent afterwards."""
        return (self.cpu_s + self.later_cpu_s) / (self.size_bytes / 1e9)

    @property
    def server_cpu_s_per_gb(self) -> float:
        """What the server spent."""
        return self.server_cpu_s / (self.size_bytes / 1e9)


@dataclass(frozen=True, slots=True)
class Figure:
    """Median and spread of a quantity over all rounds."""

    median: float
    least: float
    most: float


def figure(values: list[float]) -> Figure:
    """Of at least one value."""
    return Figure(statistics.median(values), min(values), max(values))


@dataclass(slots=True)
class Standing:
    """A contestant and its samples.

    ``reason`` says why it was not measured, or not in all rounds; ``failed`` that it tried, and that went wrong.
    """

    name: str
    title: str
    role: Role
    version: str = ""
    samples: list[Sample] = field(default_factory=list)
    reason: str = ""
    failed: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is anything to show."""
        return bool(self.samples)

    def over(self, quantity: str) -> Figure:
        """Median and spread of a property of Sample, or of one of its extra figures."""
        return figure([s.extra[quantity] if quantity in s.extra else getattr(s, quantity) for s in self.samples])

    def median(self, quantity: str) -> float:
        """The median alone."""
        return self.over(quantity).median


@dataclass(slots=True)
class Contest:
    """Contestants that did the same thing in turn. ``when``: day, revision and rounds."""

    name: str
    title: str
    standings: list[Standing]
    size_bytes: int = 0
    note: str = ""
    when: str = ""

    def get(self, name: str) -> Standing | None:
        """A contestant that was measured, or None."""
        return next((item for item in self.standings if item.name == name and item.measured), None)

    def first(self, role: Role) -> Standing | None:
        """The first measured one of a role."""
        return next((item for item in self.standings if item.role is role and item.measured), None)

    def best(self, role: Role) -> Standing | None:
        """The quickest of a role."""
        measured = [item for item in self.standings if item.role is role and item.measured]
        return max(measured, key=lambda item: item.median("gb_per_s"), default=None)

    def extra(self) -> list[str]:
        """Names of the figures that only this contest has."""
        return list(dict.fromkeys(name for item in self.standings for sample in item.samples for name in sample.extra))

    def ratio(self, name: str, other: str, quantity: str = "gb_per_s") -> float | None:
        """Of two medians; None unless both were measured."""
        ours, theirs = self.get(name), self.get(other)
        return ours.median(quantity) / theirs.median(quantity) if ours and theirs else None


Cell = str | float | int | None


@dataclass(slots=True)
class FigureTable:
    """A table whose columns are its own. Numbers stay numbers; None is shown as a dash."""

    name: str
    title: str
    heads: list[str]
    rows: list[list[Cell]]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Requirement:
    """A figure that has to be reached. ``figure`` is None when what it needs was not measured."""

    text: str
    figure: float | None
    bound: float
    at_least: bool = True
    unit: str = ""

    @property
    def reached(self) -> bool | None:
        """None when it was not measured."""
        if self.figure is None:
            return None
        return self.figure >= self.bound if self.at_least else self.figure <= self.bound


@dataclass(slots=True)
class PartResult:
    """All of one part. ``unavailable`` is the reason why it could not be measured on this machine."""

    part: str
    title: str
    contests: list[Contest] = field(default_factory=list)
    tables: list[FigureTable] = field(default_factory=list)
    requirements: list[Requirement] = field(default_factory=list)
    hardware: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    unavailable: str = ""

    def write(self, folder: Path = FOLDER) -> Path:
        """Writes ``<part>.json`` in one step."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.part}.json"
        fresh = path.with_suffix(".json.tmp")
        fresh.write_text(json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}, indent=1) + "\n", encoding="utf-8")
        fresh.replace(path)
        return path


def merged(old: PartResult, new: PartResult) -> PartResult:
    """``new``, with those contests, rows of tables and requirements of ``old`` that it does not have."""
    contests = {item.name: item for item in (*old.contests, *new.contests)}
    tables = {item.name: item for item in old.tables}
    for item in new.tables:
        before = tables.get(item.name, item)
        rows = {row[0]: row for row in (*before.rows, *item.rows)}
        tables[item.name] = dataclasses.replace(item, rows=[*rows.values()])
    requirements = {item.text: item for item in (*old.requirements, *new.requirements)}
    return dataclasses.replace(
        new, contests=[*contests.values()], tables=[*tables.values()], requirements=[*requirements.values()]
    )


def read_part(path: Path) -> PartResult:
    """The inverse of ``write``. Raises ValueError for a file of another schema."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.pop("schema", None) != SCHEMA:
        msg = f"{path} was written by another version; measure again"
        raise ValueError(msg)
    return PartResult(
        **{
            **data,
            "contests": [_contest(item) for item in data["contests"]],
            "tables": [FigureTable(**item) for item in data["tables"]],
            "requirements": [Requirement(**item) for item in data["requirements"]],
        }
    )


def _contest(data: dict[str, Any]) -> Contest:
    return Contest(**{**data, "standings": [_standing(item) for item in data["standings"]]})


def _standing(data: dict[str, Any]) -> Standing:
    samples = [Sample(**item) for item in data["samples"]]
    return Standing(**{**data, "role": Role(data["role"]), "samples": samples})
