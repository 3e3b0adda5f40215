"""The policy over random histories: attaches, releases, restarts, tiers, quotas, budgets and clocks that jump.

A host that carries plans out on plain sets is checked after every step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cached.level import Level
from cached.policy import (
    Evict,
    History,
    LevelFacts,
    Need,
    Otherwise,
    Plan,
    Quota,
    RevisionFacts,
    Snapshot,
    Verdict,
    plan,
    plan_ahead,
)
from cached.policy.admission import MARGIN, PATIENCE
from cached.policy.worth import Standing, Valuer
from cached.types import Tier

L1, L2 = Level.L1, Level.L2
NAMES = "abcdef"
SIZES = dict(zip(NAMES, (1, 3, 5, 8, 13, 21), strict=True))
TENANTS = {"a": "t", "c": "t", "e": "t"}
OTHERWISE = {L1: Otherwise.TRANSIENT, L2: Otherwise.SKIP}


@dataclass
class Host:
    """Two levels that do what the policy says, and check it."""

    now_s: float = 1e6
    capacity: dict[Level, int] = field(default_factory=lambda: {L1: 30, L2: 40})
    quota: dict[Level, int] = field(default_factory=lambda: {L1: 100, L2: 100})
    here: dict[Level, set[str]] = field(default_factory=lambda: {L1: set(), L2: set()})
    tiers: dict[str, Tier] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)
    leased: dict[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)

    def facts(self, name: str, **changes: object) -> RevisionFacts:
        blobs = {f"{name}-own": SIZES[name], "base": 2}
        known = self.history.of(name)
        facts = RevisionFacts(
            name, "1", self.tiers.get(name, Tier.AUTO), name in self.pinned, self.leased.get(name, 0) > 0,
            last_used_s=known.requests.time_s, l1_blobs=blobs if name in self.here[L1] else {},
            l2_blobs=blobs if name in self.here[L2] else {}, requests=known.requests, misses=known.misses,
            waited_l1_s=known.waited_l1_s, waited_l2_s=known.waited_l2_s, tenant=TENANTS.get(name, ""),
        )  # fmt: skip
        return replace(facts, **changes)  # type: ignore[arg-type]

    def used(self, level: Level, names: set[str] | None = None) -> int:
        held = self.here[level] if names is None else self.here[level] & names
        return sum(SIZES[name] for name in held) + (2 if held else 0)

    def level_facts(self, level: Level) -> LevelFacts:
        mix = self.history.mixes[level]
        return LevelFacts(level, self.capacity[level], self.used(level), transient_room_bytes=1000, mix=mix)

    def snapshot(self, *needs: Need) -> Snapshot:
        revisions = tuple(self.facts(name) for name in NAMES if name in self.here[L1] | self.here[L2])
        quotas = tuple(Quota("t", level, limit) for level, limit in self.quota.items())
        return Snapshot(revisions, {level: self.level_facts(level) for level in (L1, L2)}, needs, quotas)

    # What happens.

    def attach(self, name: str) -> dict[Level, Verdict]:
        hit = name in self.here[L1]
        self.history.asked(name, self.now_s, hit=hit)
        self.leased[name] = self.leased.get(name, 0) + 1
        if hit:
            return {}
        self.history.waited(name, L2 if name in self.here[L2] else Level.L3, 5.0)
        wanted = [L1] if name in self.here[L2] else [L2, L1]
        return {level: self.bring(name, level) for level in wanted}

    def bring(self, name: str, level: Level) -> Verdict:
        size = SIZES[name] + (0 if self.here[level] else 2)
        new = self.facts(name, leased=False)
        shared = {"base": 2} if self.here[level] else {}
        snapshot = self.snapshot(Need(level, size, name, new, OTHERWISE[level], shared))
        outcome = plan(snapshot, self.now_s)
        assert outcome.shortfall is None  # there is room beside L1, and L2 can be done without
        decision = outcome.decision(level)
        assert decision is not None
        victims = self.carry_out(outcome, arriving=bool(shared))
        if not decision.admitted:
            assert not victims
            return decision.verdict
        self.check_worth(snapshot, level, new, size, victims, decision.verdict)
        self.here[level].add(name)
        self.history.kept(name, level)
        assert self.used(level) <= self.capacity[level]
        if TENANTS.get(name):
            assert self.used(level, set(TENANTS)) <= self.quota[level]
        return decision.verdict

    def check_worth(
        self, snapshot: Snapshot, level: Level, new: RevisionFacts, size: int, victims: list[str], verdict: Verdict
    ) -> None:
        """By another way: values each victim with its bytes alone, which is at least what it is worth shared."""
        valuer = Valuer(snapshot.levels[level], lambda facts: facts.name in self.here[L2], self.now_s, self.now_s)
        mine = valuer.value_newcomer(new, size)
        gone = [valuer.value(facts, SIZES[facts.name]) for facts in snapshot.revisions if facts.name in victims]
        assert all(victim.standing <= mine.standing for victim in gone)
        equal = [victim for victim in gone if victim.standing == mine.standing]
        least = sum(victim.worth_s for victim in equal)
        if verdict is Verdict.WORTH:
            assert not least or mine.worth_s > MARGIN * least or mine.standing is Standing.HELD
        elif verdict is Verdict.WAITED:
            assert new.waited_s(level) >= PATIENCE * sum(victim.reload_s for victim in gone)
        else:
            assert verdict is Verdict.ROOM
            assert not victims

    def carry_out(self, outcome: Plan, *, arriving: bool = False) -> list[str]:
        """``arriving``: somebody who shares the base holds it from now on, so that no victim frees it."""
        for action in outcome.actions:
            assert isinstance(action, Evict)
            assert action.name in self.here[action.level]
            facts = self.facts(action.name)
            assert not facts.protections
            before = self.used(action.level)
            self.here[action.level].remove(action.name)
            base_bytes = 2 if arriving and not self.here[action.level] else 0
            assert before - self.used(action.level) - base_bytes == action.frees_bytes
        return [action.name for action in outcome.actions if isinstance(action, Evict)]

    def release(self, name: str) -> None:
        self.leased[name] = max(0, self.leased.get(name, 0) - 1)

    def restart(self) -> None:
        """Leases and L1 are gone; the history is not."""
        self.leased.clear()
        self.here[L1].clear()
        self.history = History.from_records(self.history.to_records())

    def shrink(self, level: Level, capacity: int) -> None:
        self.capacity[level] = capacity
        outcome = plan(self.snapshot(Need(level, 0, "a smaller capacity")), self.now_s)
        if outcome.shortfall is None:
            self.carry_out(outcome)
            assert self.used(level) <= capacity
        else:
            assert not outcome.actions
            assert any(self.facts(name).protections for name in self.here[level])

    def limit(self, level: Level, limit: int) -> None:
        self.quota[level] = limit
        self.carry_out(plan_ahead(self.snapshot(), self.now_s))
        mine = self.here[level] & set(TENANTS)
        assert self.used(level, mine) <= limit or all(self.facts(name).protections for name in mine)


names = st.sampled_from(NAMES)
levels = st.sampled_from([L1, L2])
steps = st.one_of(
    st.tuples(st.just("attach"), names),
    st.tuples(st.just("attach"), names),
    st.tuples(st.just("attach"), names),
    st.tuples(st.just("release"), names),
    st.tuples(st.just("release"), names),
    st.tuples(st.just("restart")),
    st.tuples(st.just("tier"), names, st.sampled_from(Tier)),
    st.tuples(st.just("pin"), names),
    st.tuples(st.just("shrink"), levels, st.integers(0, 60)),
    st.tuples(st.just("limit"), levels, st.integers(0, 60)),
    st.tuples(st.just("wait"), st.sampled_from([1.0, 600.0, 7200.0, 1e6, -3600.0])),
)


@settings(max_examples=150)
@given(st.lists(steps, max_size=60))
def test_promises_hold_over_any_history(history: list[tuple]) -> None:
    host = Host()
    for kind, *arguments in history:
        protected = {(level, name) for level in (L1, L2) for name in host.here[level] if host.facts(name).protections}
        if kind == "tier":
            host.tiers[arguments[0]] = arguments[1]
        elif kind == "pin":
            host.pinned ^= {arguments[0]}
        elif kind == "wait":
            host.now_s += arguments[0]
        else:
            getattr(host, kind)(*arguments)
            if kind not in {"restart", "release"}:
                assert all(name in host.here[level] for level, name in protected)


@settings(max_examples=40)
@given(
    st.dictionaries(names, st.integers(1, 12), min_size=1, max_size=5),
    names,
    st.floats(1.0, 7200.0),
)
def test_nobody_who_is_asked_for_again_and_again_is_kept_out(
    others: dict[str, int], wanted: str, every_s: float
) -> None:
    """However often the others are asked for between two of its attaches, in the end it is let in."""
    host = Host(capacity={L1: 25, L2: 200})
    for _ in range(int(PATIENCE * 8 * 26)):  # all of L1 takes no longer than this to reload
        for name, times in others.items():
            for _ in range(times if name != wanted else 0):
                host.attach(name)
                host.release(name)
        if wanted in host.here[L1]:
            return
        host.attach(wanted)
        host.release(wanted)
        host.now_s += every_s
        if wanted in host.here[L1]:
            return
    raise AssertionError(wanted)
