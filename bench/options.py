"""What a part of the benchmark is told and may use: sizes, rounds, a folder, checkpoints, the console."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench.checkpoints import Checkpoints


@dataclass(frozen=True, slots=True)
class Options:
    """``folder`` is removed after the run. ``only`` and ``contests`` choose by name; empty ones choose all."""

    rounds: int
    size_bytes: int
    quick: bool
    folder: Path
    checkpoints: Checkpoints
    console: Console
    peers_python: Path
    only: frozenset[str] = frozenset()
    contests: frozenset[str] = frozenset()

    def wants(self, contestant: str) -> bool:
        """Whether it is to be measured: chosen by its name, or by the first word of it (``cached`` of cached-crc)."""
        return not self.only or contestant in self.only or contestant.partition("-")[0] in self.only

    def wants_contest(self, contest: str) -> bool:
        """Whether it is to be held."""
        return not self.contests or contest in self.contests
