"""Who is admitted: a newcomer evicts only if it is worth more than all its victims together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from cached.level import Level
from cached.policy.snapshot import Need, Otherwise
from cached.policy.worth import Standing, Valued, spell

if TYPE_CHECKING:
    from cached.policy.shortfall import Shortfall
    from cached.policy.worth import Valuer

MARGIN = 1.25
"""How many times as much a newcomer must be worth: estimates err, and an exchange that gains nothing costs a load."""
PATIENCE = 64.0
"""A newcomer whose users waited for it this many times as long as its victims take to reload is let in at last.

So nobody who is asked for again and again is kept out for ever, and keeping that promise costs 1/64 at most of the
waiting that it ends.
"""


class Verdict(StrEnum):
    """What became of a newcomer at a level; stable, so that it can label a metric."""

    ROOM = "room"  # nothing had to go for it
    WORTH = "worth more"
    WAITED = "waited long"
    MUST = "must"  # there was no question of admission
    FORCED = "forced"  # worth less, but there was no other place to hold it
    TRANSIENT = "transient"
    SKIPPED = "skipped"


VERDICTS = {
    Verdict.ROOM: "There was room: nothing had to go for it.",
    Verdict.WORTH: "It is worth more than all that had to go for it, or stands higher.",
    Verdict.WAITED: "It is worth less, but its users have waited for it long enough.",
    Verdict.MUST: "There was no question of admission: somebody asked for it to be at that level.",
    Verdict.FORCED: "It is worth less, but could be held nowhere else.",
    Verdict.TRANSIENT: "It is worth less: it is held beside the level until its last lease ends.",
    Verdict.SKIPPED: "It is worth less: it does without a place at that level.",
}
"""What each verdict means, for people."""
_OUT = (Verdict.TRANSIENT, Verdict.SKIPPED)


@dataclass(frozen=True, slots=True)
class Newcomer:
    """All that wants into a level at once. ``standing`` and ``otherwise`` are those of the least demanding."""

    for_name: str
    otherwise: Otherwise
    standing: Standing
    worth_s: float
    waited_s: float

    @staticmethod
    def of(needs: Sequence[Need], valuer: Valuer) -> Newcomer:
        """Taken together. A need without a newcomer's facts cannot be weighed, so all of them must have their room."""
        for_name = ", ".join(dict.fromkeys(need.for_name for need in needs))
        valued = [valuer.value_newcomer(need.newcomer, need.size_bytes) for need in needs if need.newcomer is not None]
        wishes = {need.otherwise for need in needs}
        if len(valued) < len(needs) or Otherwise.EVICT in wishes:
            otherwise = Otherwise.EVICT
        else:
            otherwise = Otherwise.TRANSIENT if Otherwise.TRANSIENT in wishes else Otherwise.SKIP
        return Newcomer(
            for_name=for_name,
            otherwise=otherwise,
            standing=min((item.standing for item in valued), default=Standing.ORDINARY),
            worth_s=sum(item.worth_s for item in valued),
            waited_s=sum(item.facts.waited_s(valuer.level) for item in valued),
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided at a level, and why. ``against_s``: what those who had to go are worth together."""

    level: Level
    for_name: str
    verdict: Verdict
    worth_s: float
    against_s: float
    why: str

    @property
    def admitted(self) -> bool:
        """It has a place at the level that outlives its leases."""
        return self.verdict not in _OUT

    def forced(self) -> Decision:
        """It has its room though it is worth less."""
        why = f"{self.why}; there was no room beside the level to hold it until its lease ends"
        return replace(self, verdict=Verdict.FORCED, why=why)

    @staticmethod
    def refused(level: Level, newcomer: Newcomer, shortfall: Shortfall) -> Decision:
        """There was no room for it at all."""
        verdict = Verdict.SKIPPED if newcomer.otherwise is Otherwise.SKIP else Verdict.TRANSIENT
        return Decision(level, newcomer.for_name, verdict, newcomer.worth_s, 0.0, shortfall.error().message)


def weigh(level: Level, newcomer: Newcomer, victims: Sequence[Valued]) -> Decision:
    """Whether a newcomer may have its victims' place.

    Those who stand lower do not count against it, those who stand higher are never displaced; among equals worth
    decides. Where nothing of worth has to go, it is let in.
    """
    equals = [victim for victim in victims if victim.standing == newcomer.standing]
    against_s = sum(victim.worth_s for victim in equals)
    mine, theirs = spell(newcomer.worth_s), spell(against_s)
    worth = f"it spares {mine} of waiting in the next six hours, {len(victims)} that would have to go {theirs}"
    if not victims:
        verdict, why = Verdict.ROOM, "nothing had to go for it"
    elif newcomer.otherwise is Otherwise.EVICT:
        verdict, why = Verdict.MUST, "it must have its room"
    elif any(victim.standing > newcomer.standing for victim in victims):
        verdict, why = _out(newcomer), "those that would have to go stand higher: by tier, keep-alive or as last copies"
    elif not against_s or newcomer.worth_s > MARGIN * against_s:
        verdict, why = Verdict.WORTH, worth
    elif newcomer.waited_s >= PATIENCE * sum(victim.reload_s for victim in victims):
        verdict = Verdict.WAITED
        why = f"its users waited {spell(newcomer.waited_s)} for it since it was last kept"
    else:
        verdict, why = _out(newcomer), worth
    return Decision(level, newcomer.for_name, verdict, newcomer.worth_s, against_s, why)


def _out(newcomer: Newcomer) -> Verdict:
    return Verdict.SKIPPED if newcomer.otherwise is Otherwise.SKIP else Verdict.TRANSIENT
