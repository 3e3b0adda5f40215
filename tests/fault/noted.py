"""The file that the fault suite's outcome is kept in: an entry for each test there is, and which commit it ran at."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fault.rows import ROWS

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).resolve().parent / "results.json"
MARKS = "not gpu and not systemd and not vllm"
"""What ``make test-faults`` runs."""


def note(path: Path, ran: Mapping[str, Mapping[str, Any]], commit: str = "") -> None:
    """Takes these entries, of tests that ran at ``commit``, over what the file has.

    Tests that are not there any more lose theirs, and those that were never run get null.
    """
    known = json.loads(path.read_text()) if path.exists() else {}
    tests, machines = dict(known.get("tests", {})), dict(known.get("machines", {}))
    if ran:
        date = time.strftime("%Y-%m-%d", time.gmtime())
        machines[commit] = f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}"
        tests |= {name: {**entry, "commit": commit, "date": date} for name, entry in ran.items()}
    tests = {name: tests.get(name) for name in collected()}
    used = {entry["commit"] for entry in tests.values() if entry}
    write(path, {commit: text for commit, text in machines.items() if commit in used}, tests)


def collected() -> list[str]:
    """The whole names of all tests that cover a row, as pytest finds them now, which takes some seconds."""
    places = sorted({name for row in ROWS for name in row.tests})
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "list.json")
        run = subprocess.run(
            [
                sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "-m", MARKS,
                f"--fault-list={found}", *places,
            ],
            cwd=ROOT, env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, check=False, text=True,
        )  # fmt: skip
        if run.returncode:
            raise RuntimeError(
                f"the tests of the rows could not be collected:\n{run.stdout[-4000:]}{run.stderr[-2000:]}"
            )
        return sorted(set(json.loads(found.read_text())))


def commit_now() -> str:
    """The commit, with a ``+`` if code of the cache, of the client or of the tests differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "cached", "client", "tests/*.py")
    return git("rev-parse", "--short=9", "HEAD") + ("+" if changed else "")


def write(path: Path, machines: Mapping[str, str], tests: Mapping[str, Mapping[str, Any] | None]) -> None:
    """JSON with a line for each test."""
    head = json.dumps({"machines": machines}, indent=1)[:-2]
    rows = [f"  {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in sorted(tests.items())]
    path.write_text(f'{head},\n "tests": {{\n' + ",\n".join(rows) + "\n }\n}\n")
