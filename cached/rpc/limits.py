"""How many calls each user has at the same time, and may have: refused at once beyond that, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cached.access import Caller
from cached.config import LimitsConfig
from cached.rpc.callers import exceeded


class CallLimits:
    """Loop only."""

    def __init__(self, config: LimitsConfig) -> None:
        self._allowed = {
            "calls": config.calls_per_uid,
            "leases": config.leases_per_uid,
            "streams": config.streams_per_uid,
        }
        self._held: dict[str, Counter[str]] = {what: Counter() for what in self._allowed}

    @contextmanager
    def held(self, caller: Caller, method: str, *, streams: bool) -> Iterator[None]:
        """Around a call. Raises LimitExceededError, and then nothing is counted."""
        kinds = ["calls"]
        if streams:
            kinds.append("leases" if method == "Attach" else "streams")
        for what in kinds:
            if self._held[what][caller.name] >= self._allowed[what]:
                raise exceeded(what, caller, self._allowed[what])
        for what in kinds:
            self._held[what][caller.name] += 1
        try:
            yield
        finally:
            for what in kinds:
                self._held[what][caller.name] -= 1
                if not self._held[what][caller.name]:
                    del self._held[what][caller.name]
