"""How the processes of the churn tell what they do, and end.

Every second a line of JSON on standard output: what was done since the last. A line on standard input, or its end,
makes them give everything back and exit: with 1 if a thread of theirs had ended before.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_EVERY_S = 1.0


@dataclass
class Told:
    """What was done since it was last told; several threads add to it."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    latencies_ms: dict[str, list[float]] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def did(self, what: str, seconds: float | None = None, key: str = "") -> None:
        """An operation that went well."""
        with self._lock:
            self.counts[what] += 1
            if seconds is not None:
                self.latencies_ms.setdefault(key or what, []).append(round(seconds * 1e3, 3))

    def failed(self, what: str, reason: str, text: str) -> None:
        """One that was answered with an error."""
        with self._lock:
            self.errors[f"{what}: {reason}"] += 1
            self.examples.setdefault(f"{what}: {reason}", text[:400])

    def is_wrong(self, text: str) -> None:
        """What must not be."""
        with self._lock:
            self.wrong.append(text)

    def take(self) -> dict[str, Any]:
        """All of it, as JSON; it begins anew."""
        with self._lock:
            told = {
                "counts": dict(self.counts), "errors": dict(self.errors), "examples": dict(self.examples),
                "latencies_ms": self.latencies_ms, "wrong": self.wrong,
            }  # fmt: skip
            self.counts, self.errors, self.latencies_ms, self.wrong = Counter(), Counter(), {}, []
        return told


def run_until_told(
    threads: Sequence[threading.Thread], told: Told, ending: threading.Event, held: Callable[[], int]
) -> None:
    """Starts the threads, tells what they do, and ends the process. ``held``: the leases right now."""

    def tell() -> None:
        line = {**told.take(), "leases": held()}
        os.write(1, json.dumps(line).encode() + b"\n")

    def tell_always() -> None:
        while True:
            time.sleep(_EVERY_S)
            tell()

    for thread in threads:
        thread.start()
    threading.Thread(target=tell_always, daemon=True).start()
    sys.stdin.readline()
    early = sum(not thread.is_alive() for thread in threads)
    ending.set()
    for thread in threads:
        thread.join()
    gc.collect()
    tell()
    os._exit(1 if early else 0)  # without waiting for what gRPC's own threads still do
