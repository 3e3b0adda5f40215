"""A fleet-wide bound on pulls at the same time: one of N Lease objects is held while pulling.

As client-go's leader election does, nobody compares another host's clock with its own: a holder counts as gone when its
record has not changed for the duration that it names, by the watcher's own clock since the watcher first saw it so.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Protocol, TypeVar

import structlog

from cached.clock import Clock
from cached.fleet.kube import KubeError, LeaseState

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

LEASE_NAME = "cached-pull"
LEASE_S = 60
"""How long a holder that died keeps its slot, at least: others may see it up to a poll later."""
AWAY_S = 30.0
"""Who cannot ask for a slot for so long goes on without one: a fleet that serves is worth more than a calm bucket."""
_RENEWALS = 3
_RELEASE_S = 3.0
_FIRST_POLL_S, _LAST_POLL_S = 0.25, 10.0


class LeaseApi(Protocol):
    """See KubeApi."""

    def lease(self, name: str) -> LeaseState | None:
        """The Lease, or None."""
        ...

    def write_lease(self, name: str, state: LeaseState) -> LeaseState:
        """Makes or replaces it."""
        ...


def lease_name(slot: int) -> str:
    """Of a slot, from 0."""
    return f"{LEASE_NAME}-{slot}"


def poll_delay_s(attempt: int, rng: random.Random) -> float:
    """Between two looks of a waiting daemon, the first of which is attempt 1: soon at first, then every 5 to 15 s.

    So a thousand that wait ask the API about a hundred times a second together.
    """
    return min(_LAST_POLL_S, _FIRST_POLL_S * 1.6**attempt) * rng.uniform(0.5, 1.5)


class Watched:
    """The records that one daemon has seen, and when each last changed, by its own clock. Pure."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[LeaseState, float]] = {}

    def is_free(self, name: str, state: LeaseState | None, now_s: float) -> bool:
        """Whether a slot may be taken that was just read so: nobody has it, or its holder is gone."""
        if state is None or not state.holder:
            self._seen.pop(name, None)
            return True
        before = self._seen.get(name)
        if before is None or before[0] != state:
            self._seen[name] = (state, now_s)
            return False
        return now_s - before[1] > state.duration_s


class Slots:
    """Loop only; the API is asked in threads. ``count`` slots; ``identity`` names this daemon, across restarts."""

    def __init__(
        self,
        api: LeaseApi,
        clock: Clock,
        *,
        count: int,
        identity: str,
        on_outcome: Callable[[str], None] = lambda _outcome: None,
        on_away: Callable[[str], None] = lambda _why: None,
        rng: random.Random | None = None,
    ) -> None:
        """``on_outcome``: acquired, taken_over, skipped (the API is away), lost. ``on_away``: why; empty: over."""
        self._api = api
        self._clock = clock
        self._count = count
        self._identity = identity
        self._on_outcome = on_outcome
        self._on_away = on_away
        self._rng = rng or random.Random()  # noqa: S311 not a secret
        self._watched = Watched()

    @asynccontextmanager
    async def held(self) -> AsyncIterator[str]:
        """In the block a slot is held, whose name it gets; an empty one if the API could not be asked for AWAY_S.

        A slot that is lost meanwhile is told, and the block goes on.
        """
        name, state = await self._acquire()
        if state is None:
            try:
                yield ""
            finally:
                self._on_away("")  # nobody asks any more
            return
        holding = [state]
        renewing = asyncio.create_task(self._renew(name, holding), name=f"renew {name}")
        try:
            yield name
        finally:
            renewing.cancel()
            (end,) = await asyncio.gather(renewing, return_exceptions=True)
            if isinstance(end, Exception):
                _log.error("slot.renewing_failed", slot=name, exc_info=end)  # it was lost meanwhile, untold
            await self._release(name, holding[0])

    async def _acquire(self) -> tuple[str, LeaseState | None]:
        away_since_s: float | None = None
        order = list(range(self._count))
        self._rng.shuffle(order)
        attempt = 0
        while True:
            slot = order[attempt] if attempt < len(order) else self._rng.randrange(self._count)
            wait_s = 0.0
            try:
                state = await self._try(lease_name(slot))
                away_since_s = None
                self._on_away("")
                if state is not None:
                    return lease_name(slot), state
            except KubeError as error:
                now_s = self._clock.monotonic_s()
                away_since_s = now_s if away_since_s is None else away_since_s
                self._on_away(str(error))
                if now_s - away_since_s >= AWAY_S:
                    self._on_outcome("skipped")
                    return "", None
                wait_s = error.retry_after_s
            attempt += 1
            delay_s = poll_delay_s(attempt, self._rng)
            if away_since_s is not None:
                delay_s = min(delay_s, AWAY_S / 4)
            await self._clock.sleep(wait_s + delay_s)

    async def _try(self, name: str) -> LeaseState | None:
        """The slot, if it could be had. Raises KubeError if that cannot be said."""
        found = await self._ask(lambda: self._api.lease(name))
        own = found is not None and found.holder == self._identity  # of this daemon, before it was restarted
        if not own and not self._watched.is_free(name, found, self._clock.monotonic_s()):
            return None
        before = found or LeaseState()
        wanted = replace(
            before, holder=self._identity, duration_s=LEASE_S, transitions=before.transitions + (found is not None)
        )
        try:
            state = await self._ask(lambda: self._api.write_lease(name, wanted))
        except KubeError as error:
            if error.is_conflict:
                return None  # somebody was quicker
            raise
        self._on_outcome("taken_over" if before.holder and not own else "acquired")
        return state

    async def _renew(self, name: str, holding: list[LeaseState]) -> None:
        renewed_s = self._clock.monotonic_s()
        while True:
            await self._clock.sleep(LEASE_S / _RENEWALS * self._rng.uniform(0.8, 1.0))
            try:
                state = holding[0]
                holding[0] = await self._ask(lambda state=state: self._api.write_lease(name, state))  # type: ignore[misc]
                renewed_s = self._clock.monotonic_s()
            except KubeError as error:
                _log.warning("slot.not_renewed", slot=name, cause=str(error))
                late = self._clock.monotonic_s() - renewed_s > LEASE_S
                if late or (error.is_conflict and not await self._still_ours(name, holding)):
                    self._on_outcome("lost")
                    holding[0] = LeaseState()
                    return

    async def _still_ours(self, name: str, holding: list[LeaseState]) -> bool:
        """After a conflict: an answer of an earlier write may have been lost on its way."""
        with suppress(KubeError):
            found = await self._ask(lambda: self._api.lease(name))
            if found is None or found.holder != self._identity:
                return False
            holding[0] = found
        return True

    async def _release(self, name: str, state: LeaseState) -> None:
        if state.holder != self._identity:
            return
        free = replace(state, holder="", duration_s=1)
        try:
            async with asyncio.timeout(_RELEASE_S):
                try:
                    await self._ask(lambda: self._api.write_lease(name, free))
                except KubeError as error:
                    # A renewal that was cancelled may have been written.
                    current = [state]
                    if not error.is_conflict or not await self._still_ours(name, current):
                        raise
                    free = replace(current[0], holder="", duration_s=1)
                    await self._ask(lambda: self._api.write_lease(name, free))
        except (KubeError, TimeoutError) as error:
            _log.warning("slot.not_released", slot=name, cause=str(error) or "no answer in time")

    async def _ask(self, question: Callable[[], _T]) -> _T:
        return await asyncio.to_thread(question)
