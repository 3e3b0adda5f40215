"""What stays where: a pure function from what is known to what is to be done."""

from cached.policy.plan import Action, DropPool, Evict, Holder, Plan, Shortfall, plan, plan_idle
from cached.policy.snapshot import LevelFacts, Need, RevisionFacts, Snapshot

__all__ = [
    "Action",
    "DropPool",
    "Evict",
    "Holder",
    "LevelFacts",
    "Need",
    "Plan",
    "RevisionFacts",
    "Shortfall",
    "Snapshot",
    "plan",
    "plan_idle",
]
