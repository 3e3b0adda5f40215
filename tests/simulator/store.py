"""The simulated index file: a transaction is durable, or it failed and none of it is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cached.errors import LevelError
from cached.level import Level
from tests.simulator.faults import Faults


class SimStore:
    """As cached.index.Store. ``durable`` is the file: it outlives whoever had it open."""

    def __init__(self, path: Path, durable: dict[str, str], faults: Faults) -> None:
        self.path = path
        self.warnings: list[str] = []
        self.damaged: list[str] = []
        self._durable = durable
        self._faults = faults

    def take_entries(self) -> dict[str, str]:
        """See Store."""
        return dict(self._durable)

    def write(self, changes: Mapping[str, str | None]) -> None:
        """See Store."""
        if self._faults.strikes("store_fails"):
            raise LevelError(f"cannot write the index {self.path}: simulated", level=Level.L2, path=self.path)
        for key, text in changes.items():
            if text is None:
                self._durable.pop(key, None)
            else:
                self._durable[key] = text

    def close(self) -> None:
        """See Store."""
