"""The accounts of a level's blobs: a blob that several revisions hold is freed by the last of them only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

from cached.level import Level
from cached.policy.snapshot import RevisionFacts


class Residents:
    """Counts how many of these revisions hold each blob of a level. Evictions are tried here before they are done."""

    def __init__(self, revisions: Sequence[RevisionFacts], level: Level) -> None:
        self._level = level
        self._revisions = revisions
        # In one go: this is most of a plan's work, and a plan holds the loop up.
        self._holders = Counter(chain.from_iterable([facts.blobs(level) for facts in revisions]))
        protected = [facts.blobs(level) for facts in revisions if facts.protected]
        self._locked = frozenset(chain.from_iterable(protected))

    def evictable(self) -> list[RevisionFacts]:
        """Those that hold something here and may go."""
        return [facts for facts in self._revisions if facts.blobs(self._level) and not facts.protected]

    def own_bytes(self, facts: RevisionFacts) -> float:
        """Bytes that go with it, those of a shared blob divided among its holders: 0 if its going can free nothing."""
        holders, locked = self._holders, self._locked
        own = 0.0
        for digest, size_bytes in facts.blobs(self._level).items():
            if digest not in locked:
                own += size_bytes / holders[digest]
        return own

    def held_bytes(self) -> int:
        """All of these revisions' bytes, shared blobs counted once."""
        sizes = {d: size for facts in self._revisions for d, size in facts.blobs(self._level).items()}
        return sum(size for digest, size in sizes.items() if self._holders[digest])

    def evict(self, facts: RevisionFacts) -> int:
        """Bytes that its going frees."""
        freed_bytes = 0
        holders = self._holders
        for digest, size_bytes in facts.blobs(self._level).items():
            holders[digest] -= 1
            if not holders[digest]:
                freed_bytes += size_bytes
        return freed_bytes

    def spare(self, facts: RevisionFacts) -> int:
        """Takes ``evict`` back; bytes that it no longer frees."""
        kept_bytes = 0
        holders = self._holders
        for digest, size_bytes in facts.blobs(self._level).items():
            if not holders[digest]:
                kept_bytes += size_bytes
            holders[digest] += 1
        return kept_bytes

    def choose(self, candidates: Iterable[RevisionFacts], wanted_bytes: int) -> list[RevisionFacts] | None:
        """Evicts in this order until enough is free, and spares who is not needed; None (and nothing) if it is not."""
        chosen: list[RevisionFacts] = []
        freed_bytes = 0
        for facts in candidates:
            if freed_bytes >= wanted_bytes:
                break
            freed_bytes += self.evict(facts)
            chosen.append(facts)
        if freed_bytes < wanted_bytes:
            for facts in chosen:
                self.spare(facts)
            return None
        return self.spare_needless(chosen, freed_bytes - wanted_bytes)

    def spare_needless(self, victims: list[RevisionFacts], surplus_bytes: int) -> list[RevisionFacts]:
        """The victims that remain when those are spared, dearest first, whose bytes the surplus makes up for.

        One pass is enough: the fewer the victims, the less a shared blob is freed, so what was needed stays needed.
        """
        needed: list[RevisionFacts] = []
        for facts in reversed(victims):
            kept_bytes = self.spare(facts)
            if kept_bytes <= surplus_bytes:
                surplus_bytes -= kept_bytes
            else:
                self.evict(facts)
                needed.append(facts)
        return needed[::-1]

    def freed_in_turn(self, victims: Sequence[RevisionFacts]) -> list[int]:
        """What each of those evicted here frees when they go in this order."""
        for facts in victims:
            self.spare(facts)
        return [self.evict(facts) for facts in victims]
