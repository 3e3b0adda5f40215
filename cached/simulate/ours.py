"""The daemon's own policy, as its engine uses it: the same functions on the same facts."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace

from cached.errors import InvalidRequestError
from cached.level import Level
from cached.policy import Evict, History, LevelFacts, Need, Otherwise, RevisionFacts, Snapshot, plan
from cached.simulate.setup import Setup, Standing
from cached.simulate.trace import Row
from cached.types import Tier
from cached.units import format_size

_NO_BLOBS: Mapping[str, int] = {}
_REVISION = "simulated"
_UNTOLD = Standing()
_ENDLESS = 1 << 62


class OurKeeper:
    """Both levels as the policy keeps them. Each model is one blob, and every transient segment finds memory."""

    def __init__(self, setup: Setup, preloaded: frozenset[str], sizes: Mapping[str, int]) -> None:
        self._setup = setup
        self._preloaded = preloaded
        self._history = History()
        self._here: dict[str, RevisionFacts] = {}
        self._capacity = {Level.L1: setup.l1_bytes, Level.L2: setup.l2_bytes}
        self._used = {Level.L1: 0, Level.L2: 0}
        self.evictions = 0
        self.prefetched_bytes = 0
        self._bring_hot(sizes)

    def _bring_hot(self, sizes: Mapping[str, int]) -> None:
        standings = self._setup.standings
        hot = {name: size for name, size in sizes.items() if standings.get(name, _UNTOLD).tier is Tier.HOT}
        if sum(hot.values()) > self._setup.l1_bytes:
            raise InvalidRequestError(
                f"the hot models take {format_size(sum(hot.values()))}, L1 has {format_size(self._setup.l1_bytes)}",
                hint="give L1 more capacity, or make fewer models hot",
            )
        for name, size_bytes in hot.items():
            self._put(Level.L1, self._facts(name, size_bytes, 0.0), size_bytes)
            if name not in self._preloaded:
                self.prefetched_bytes += size_bytes

    def has(self, level: Level, model: str) -> bool:
        """See Keeper."""
        facts = self._here.get(model)
        return facts is not None and bool(facts.blobs(level))

    def forget(self, model: str) -> None:
        """See Keeper."""
        for level in self._used:
            self._take(level, model)

    def hit(self, row: Row) -> None:
        """See Keeper."""
        history = self._history.asked(row.model, row.time_s, hit=True)
        if row.model in self._here:  # otherwise only a transient segment has it
            self._here[row.model] = replace(self._here[row.model], requests=history.requests, last_used_s=row.time_s)

    def loaded(self, row: Row, source: Level, leased: Container[str]) -> bool:
        """See Keeper."""
        model = row.model
        self._history.asked(model, row.time_s, hit=False)
        self._history.waited(model, source, self._setup.seconds(source, row.size_bytes))
        if model in self._here:
            self._here[model] = self._facts(model, row.size_bytes, row.time_s)
        if source is Level.L3 and self._setup.preloaded is None:
            self._admit(Level.L2, row, Otherwise.SKIP, leased)
        return self._admit(Level.L1, row, Otherwise.TRANSIENT, leased)

    def _admit(self, level: Level, row: Row, otherwise: Otherwise, leased: Container[str]) -> bool:
        newcomer = self._facts(row.model, row.size_bytes, row.time_s)
        need = Need(level, row.size_bytes, row.model, newcomer, otherwise)
        planned = plan(Snapshot(self._revisions(leased), {level: self._level_facts(level)}, (need,)), row.time_s)
        decision = planned.decision(level)
        if decision is None or not decision.admitted:
            return False
        for action in planned.actions:
            if isinstance(action, Evict):
                self._take(level, action.name)
                self.evictions += 1
        self._put(level, newcomer, row.size_bytes)
        self._history.kept(row.model, level)
        return True

    def _revisions(self, leased: Container[str]) -> tuple[RevisionFacts, ...]:
        return tuple(
            replace(facts, leased=True) if name in leased else facts  # a copy for the few that are leased
            for name, facts in self._here.items()
        )

    def _level_facts(self, level: Level) -> LevelFacts:
        return LevelFacts(
            level,
            self._capacity[level],
            self._used[level],
            transient_room_bytes=_ENDLESS,
            mix=self._history.mixes[level],
        )

    def _facts(self, model: str, size_bytes: int, now_s: float) -> RevisionFacts:
        standing = self._setup.standings.get(model, _UNTOLD)
        history = self._history.of(model)
        known = self._here.get(model)
        in_l2 = model in self._preloaded or self.has(Level.L2, model)
        return RevisionFacts(
            name=model,
            revision=_REVISION,
            tier=standing.tier,
            pinned=standing.pinned,
            priority=standing.priority,
            last_used_s=now_s,
            l1_blobs=known.l1_blobs if known else _NO_BLOBS,
            l2_blobs={model: size_bytes} if in_l2 else _NO_BLOBS,
            requests=history.requests,
            misses=history.misses,
            waited_l1_s=history.waited_l1_s,
            waited_l2_s=history.waited_l2_s,
            from_l2=self._setup.from_l2,
            from_l3=self._setup.from_l3,
        )

    def _put(self, level: Level, facts: RevisionFacts, size_bytes: int) -> None:
        blobs = {facts.name: size_bytes}
        at_l1 = level is Level.L1
        self._here[facts.name] = replace(facts, l1_blobs=blobs) if at_l1 else replace(facts, l2_blobs=blobs)
        self._used[level] += size_bytes

    def _take(self, level: Level, model: str) -> None:
        known = self._here.get(model)
        if known is None:
            return
        self._used[level] -= sum(known.blobs(level).values())
        left = replace(known, l1_blobs=_NO_BLOBS) if level is Level.L1 else replace(known, l2_blobs=_NO_BLOBS)
        if left.l1_blobs or left.l2_blobs:
            self._here[model] = left
        else:
            del self._here[model]
