"""What stays where: a pure function from what is known to what is to be done."""

from cached.policy.admission import Decision, Verdict
from cached.policy.demand import Demand, History, Mix, ModelHistory
from cached.policy.plan import Action, DropPool, Evict, Plan, plan, plan_ahead, plan_idle
from cached.policy.reload import Hop, HopTimes
from cached.policy.shortfall import Holder, Shortfall
from cached.policy.snapshot import LevelFacts, Need, Otherwise, Quota, RevisionFacts, Snapshot

__all__ = [
    "Action",
    "Decision",
    "Demand",
    "DropPool",
    "Evict",
    "History",
    "Holder",
    "Hop",
    "HopTimes",
    "LevelFacts",
    "Mix",
    "ModelHistory",
    "Need",
    "Otherwise",
    "Plan",
    "Quota",
    "RevisionFacts",
    "Shortfall",
    "Snapshot",
    "Verdict",
    "plan",
    "plan_ahead",
    "plan_idle",
]
