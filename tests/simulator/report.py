"""What was run, noted in a file of the repository, and the table that docs/reliability.md shows of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).with_name("results.json")
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Run:
    """Histories with consecutive seeds. ``took_s``: on the clock, beside whatever else the machine did."""

    mode: str
    first_seed: int
    histories: int
    failed: list[int]
    took_s: float
    processes: int
    commit: str = ""
    date: str = ""

    @property
    def per_minute(self) -> float:
        """Histories."""
        return 60 * self.histories / self.took_s

    def __str__(self) -> str:
        return (
            f"{self.histories} histories with {self.mode} faults, {len(self.failed)} failed; {self.took_s:.1f} s, "
            f"{self.per_minute:.0f} a minute"
        )


def note(run: Run, path: Path) -> None:
    """Adds a run, of the commit that is checked out, in place of an earlier one of the same seeds."""
    noted = json.loads(path.read_text()) if path.exists() else {"runs": []}
    run = replace(run, commit=_commit(), date=datetime.now(UTC).date().isoformat(), took_s=round(run.took_s, 1))
    noted["machine"] = {
        "cpus": os.cpu_count(), "kernel": platform.release(), "python": platform.python_version(),
    }  # fmt: skip
    others = [each for each in noted["runs"] if (each["mode"], each["first_seed"]) != (run.mode, run.first_seed)]
    noted["runs"] = sorted([*others, asdict(run)], key=lambda each: (each["mode"], each["first_seed"]))
    path.write_text(json.dumps(noted, indent=1) + "\n")


def _commit() -> str:
    """The commit, with a ``+`` if tracked files of the engine or of the simulator differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "cached", "tests/simulator/*.py")
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def histories_text() -> str:
    """The table of docs/reliability.md."""
    if not RESULTS.exists():
        return "Nothing was noted yet: `make simulate-faults` does."
    noted = json.loads(RESULTS.read_text())
    machine = noted["machine"]
    lines = [
        f"Noted on {machine['cpus']} CPUs, Linux {machine['kernel']}, Python {machine['python']}.",
        "",
        "| faults | histories | failed | histories a minute | processes | seeds | commit | date |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for mode in ("bounded", "unbounded"):
        runs = [Run(**each) for each in noted["runs"] if each["mode"] == mode]
        if runs:
            lines.append(_row(mode, runs))
    return "\n".join(lines)


def _row(mode: str, runs: list[Run]) -> str:
    total, took_s = sum(run.histories for run in runs), sum(run.took_s for run in runs)
    failed = [seed for run in runs for seed in run.failed]
    cells = [
        mode,
        f"{total:,}",
        f"{len(failed)}" + (f": {', '.join(map(str, failed))}" if failed else ""),
        f"{60 * total / took_s:,.0f}",
        ", ".join(str(count) for count in sorted({run.processes for run in runs})),
        ", ".join(_spans(runs)),
        ", ".join(f"`{commit}`" for commit in dict.fromkeys(run.commit for run in runs)),
        ", ".join(dict.fromkeys(run.date for run in runs)),
    ]
    return f"| {' | '.join(cells)} |"


def _spans(runs: list[Run]) -> list[str]:
    """The seeds, adjoining runs together."""
    spans: list[tuple[int, int]] = []
    for run in sorted(runs, key=lambda run: run.first_seed):
        last = run.first_seed + run.histories - 1
        if spans and spans[-1][1] + 1 == run.first_seed:
            spans[-1] = spans[-1][0], last
        else:
            spans.append((run.first_seed, last))
    return [f"{first} to {last}" for first, last in spans]
