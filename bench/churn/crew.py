"""The processes of the churn, as who started them sees it: what they tell, added up, and how they are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_ROOT = Path(__file__).resolve().parents[2]
_END_S = 120.0
_KEPT = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH")


REFUSALS = frozenset({"NO_ROOM", "IN_USE", "NOT_FOUND", "NO_SOURCE", "TIMED_OUT"})
"""Answers that are right where everything happens at once."""

RESTART_REFUSALS = frozenset({"UNAVAILABLE", "DAEMON_UNAVAILABLE", "LEASE_LOST"})
"""Those that are right while a daemon is killed and started again."""


@dataclass
class Tally:
    """What all processes did, those that were killed too. Latencies are kept with the time at which they were told."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    latencies_ms: dict[str, tuple[array[float], array[float]]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, line: dict[str, Any]) -> None:
        """One line that a process wrote."""
        now_s = time.monotonic()
        with self.lock:
            self.counts.update(line["counts"])
            self.errors.update(line["errors"])
            self.examples = {**line["examples"], **self.examples}
            self.wrong += line["wrong"]
            for name, values in line["latencies_ms"].items():
                times, all_values = self.latencies_ms.setdefault(name, (array("d"), array("f")))
                times.extend([now_s] * len(values))
                all_values.extend(values)

    def unexpected(self, restarts: bool) -> dict[str, str]:
        """Operations with the reasons for which they may not be refused, and an example of each."""
        right = REFUSALS | (RESTART_REFUSALS if restarts else set())
        with self.lock:
            return {what: self.examples[what] for what in self.errors if what.rpartition(": ")[2] not in right}

    @property
    def done(self) -> int:
        """Operations that went well, or were refused as they should be."""
        with self.lock:
            return sum(self.counts.values()) + sum(self.errors.values())


class Member:
    """One process; ``module`` of this package with its order."""

    def __init__(self, module: str, order: Mapping[str, Any], tally: Tally, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.module = module
        self.leases = 0
        self._tally = tally
        order_file = folder / f"{module}.json"
        order_file.write_text(json.dumps(order), encoding="utf-8")
        self._log = folder / f"{module}.log"
        environment = {key: os.environ[key] for key in _KEPT if key in os.environ} | {
            "PYTHONPATH": os.pathsep.join(map(str, (_ROOT, _ROOT / "client")))
        }
        with self._log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"bench.churn.{module}", str(order_file)], cwd=_ROOT, env=environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ended_by_itself(self) -> str:
        """Why, if it did; empty while it runs."""
        if self._process.poll() is None:
            return ""
        return f"{self.module} ended with status {self._process.returncode}: {self._log.read_text()[-2000:]}"

    def signal(self, number: int) -> None:
        """Sends it."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when it is gone and all that it had told is counted."""
        self._process.kill()
        self._wait()

    def end(self) -> int:
        """Lets it give everything back; its exit status. RuntimeError if it does not end."""
        self.ask_to_end()
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGABRT)
            raise RuntimeError(f"{self.module} {self.pid} did not end within {_END_S:g} s") from None
        finally:
            self.kill()

    def ask_to_end(self) -> None:
        """Without waiting."""
        with suppress(BrokenPipeError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def _wait(self) -> None:
        self.ask_to_end()
        self._process.wait()
        self._reader.join()
        self.leases = 0

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for raw in lines:
                with suppress(ValueError):  # killed while it wrote
                    line = json.loads(raw)
                    self.leases = line["leases"]
                    self._tally.add(line)


class Crew:
    """A context manager: all workers and the operators of the churn, some of which are killed now and then."""

    def __init__(self, folder: Path, socket: Path, models: Path, *, workers: int, leases: int, threads: int) -> None:
        self._folder = folder
        self._order = {"socket": str(socket), "models": str(models), "threads": threads}
        self._shares = [leases // workers + (number < leases % workers) for number in range(workers)]
        self.tally = Tally()
        self.workers: list[Member] = []
        self.operators: list[Member] = []
        self._stopped: dict[int, float] = {}

    def __enter__(self) -> Self:
        try:
            self.workers = [self._worker(number) for number in range(len(self._shares))]
            self.operators = [Member("operator", {**self._order, "threads": 3}, self.tally, self._folder / "operator")]
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    @property
    def leases(self) -> int:
        """As the workers told a second ago."""
        return sum(worker.leases for worker in self.workers)

    def fallen(self) -> list[str]:
        """Those that ended without being told to, and their last words."""
        return [words for member in [*self.workers, *self.operators] if (words := member.ended_by_itself())]

    def replace_worker(self, number: int) -> None:
        """SIGKILL; a new one takes its place."""
        self.workers[number].kill()
        self.workers[number] = self._worker(number)

    def kill(self) -> None:
        """All of them."""
        for member in [*self.workers, *self.operators]:
            member.kill()

    def end(self) -> list[str]:
        """All give back what they have. What went wrong doing so."""
        members = [*self.operators, *self.workers]
        for member in members:
            member.signal(signal.SIGCONT)
            member.ask_to_end()
        return [
            f"{member.module} ended with status {status}; see its log" for member in members if (status := member.end())
        ]

    def _worker(self, number: int) -> Member:
        order = {**self._order, "leases": self._shares[number]}
        return Member("worker", order, self.tally, self._folder / f"worker-{number}")
