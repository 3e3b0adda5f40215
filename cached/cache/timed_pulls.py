"""Pulls that begin later: remembered across restarts, and begun by themselves when their time has come."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from math import inf, isnan

from cached.cache.background import cancel, repeat
from cached.cache.pulls import Pulls
from cached.cache.services import Services
from cached.errors import CachedError, InvalidRequestError, UnavailableError
from cached.index import TimedPull
from cached.level import Level
from cached.refs import Ref, parse_ref
from cached.types import Tier

_LOOK_S = 1.0
_LATE_S = 60.0
"""A time that has passed by no more than this was meant as now: clocks differ, and requests take a moment."""
_MOST = 1000
_FURTHEST_S = 366 * 86400.0


class TimedPulls:
    """Loop only. Goes by the time of day: a clock that jumps ahead begins what it jumped over."""

    def __init__(self, services: Services, pulls: Pulls) -> None:
        self._services = services
        self._pulls = pulls
        self._beginning: dict[str, asyncio.Task[None]] = {}

    def add(self, ref: Ref, text: str, at_time_s: float, *, source: str, level: Level, tier: Tier | None) -> None:
        """Remembers a pull of ``text`` for that Unix time. What is wrong with it already is raised now, as by a pull.

        Infinity: never, so that those which were asked for before are forgotten.
        """
        registry = self._services.registry
        if at_time_s == inf:
            self.forget(ref.name)
            self._forget_model(ref.name)
            return
        self._check_time(at_time_s)
        if len(registry.index.timed()) >= _MOST:  # before the model becomes known by it
            raise UnavailableError(
                f"{_MOST} pulls are scheduled already",
                hint="wait, or take those of a model back: cached pull NAME --at never",
            )
        self._pulls.check(ref, source)
        pull = TimedPull(ref.name, text, at_time_s, source=source, level=level, tier=tier)
        registry.write(lambda: registry.index.put_timed(pull))
        self._services.events.emit(
            "pull.scheduled", f"{ref} will be pulled later", name=ref.name, at_time_s=at_time_s, level=level.value
        )

    def _check_time(self, at_time_s: float) -> None:
        now_s = self._services.clock.wall_s()
        if isnan(at_time_s) or at_time_s < now_s - _LATE_S:
            raise InvalidRequestError(
                "the time to begin the pull has passed", hint="give one to come, or leave it away", value=at_time_s
            )
        if at_time_s > now_s + _FURTHEST_S:
            raise InvalidRequestError(
                "the time to begin the pull is more than a year ahead",
                hint="times are seconds since the Unix epoch; give one that is nearer",
                value=at_time_s,
            )

    def forget(self, name: str) -> None:
        """Drops a model's pulls that have not begun."""
        registry = self._services.registry
        pulls = list(registry.index.timed(name))
        for pull in pulls:
            registry.write(lambda pull=pull: registry.index.delete_timed(pull))  # type: ignore[misc]
        if pulls:
            self._services.events.emit(
                "pull.unscheduled", f"{name} is not pulled later any more", name=name, count=len(pulls)
            )

    def _forget_model(self, name: str) -> None:
        """A model that only its timed pulls made known goes with them, unless a pull of it is under way."""
        registry = self._services.registry
        model = registry.models.get(name)
        if model is not None and not self._pulls.is_under_way(name):
            registry.forget_if_unknown(model)

    def load(self) -> None:
        """After a restart: the models of timed pulls are known again."""
        for pull in self._services.registry.index.timed():
            self._services.registry.known(pull.name)

    async def run(self) -> None:
        """Until cancelled; what has not been resolved by then is begun again by the next daemon."""
        try:
            self._begin_due()
            await repeat(
                self._services.clock, _LOOK_S, self._look, what="timed_pulls", failures=self._services.failures
            )
        finally:
            await cancel(self._services.failures, "timed_pulls", *self._beginning.values())

    async def _look(self) -> None:
        self._begin_due()

    def _begin_due(self) -> None:
        now_s = self._services.clock.wall_s()
        for pull in self._services.registry.index.timed():
            if pull.at_time_s <= now_s and pull.key not in self._beginning:
                task = asyncio.get_running_loop().create_task(self._begin(pull), name=f"timed pull {pull.name}")
                self._beginning[pull.key] = task

    async def _begin(self, pull: TimedPull) -> None:
        """Forgets it only once it goes on by itself, or has failed: `cached show` tells why, as of any pull."""
        registry = self._services.registry
        try:
            with self._services.failures.survived("timed_pulls"):
                run = self._pulls.begin(
                    parse_ref(pull.ref), source=pull.source, level=pull.level, tier=pull.tier, unattended=True
                )
                with suppress(CachedError):  # told as of any pull
                    await run.until_planned()
            registry.write(lambda: registry.index.delete_timed(pull))
            self._forget_model(pull.name)
        finally:
            del self._beginning[pull.key]
