"""How many calls each user has at the same time, and may have: refused at once beyond that, and nobody else notices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from cached.access import Caller
from cached.config import LimitsConfig
from cached.errors import LimitExceededError
from cached.rpc.callers import exceeded


class CallLimits:
    """Loop only. Also of all calls together: gRPC's own bound would refuse health with them, and would not say why."""

    def __init__(self, config: LimitsConfig, *, in_all: int) -> None:
        self._in_all = in_all
        self._allowed = {
            "calls": config.calls_per_uid,
            "leases": config.leases_per_uid,
            "streams": config.streams_per_uid,
        }
        self._held: dict[str, Counter[str]] = {what: Counter() for what in self._allowed}

    def used_ratios(self) -> dict[str, float]:
        """How far each limit is used; that of each user by the one who has the most."""
        most = {what: max(held.values(), default=0) / self._allowed[what] for what, held in self._held.items()}
        return most | {"all_calls": self._held["calls"].total() / self._in_all}

    @contextmanager
    def held(self, caller: Caller, method: str, *, streams: bool) -> Iterator[None]:
        """Around a call. Raises LimitExceededError, and then nothing is counted."""
        kinds = ["calls"]
        if streams:
            kinds.append("leases" if method == "Attach" else "streams")
        for what in kinds:
            if self._held[what][caller.name] >= self._allowed[what]:
                raise exceeded(what, caller, self._allowed[what])
        if self._held["calls"].total() >= self._in_all:
            raise self._too_many(caller)
        for what in kinds:
            self._held[what][caller.name] += 1
        try:
            yield
        finally:
            for what in kinds:
                self._held[what][caller.name] -= 1
                if not self._held[what][caller.name]:
                    del self._held[what][caller.name]

    def _too_many(self, caller: Caller) -> LimitExceededError:
        return LimitExceededError(
            f"the daemon has {self._in_all} calls of all users together, and takes no more",
            hint="try again in a moment, or let the operator lower limits.calls_per_uid: more is then left for others",
            limit="all calls", setting="limits.calls_per_uid", caller=caller.name, allowed=self._in_all,
        )  # fmt: skip
