"""What another tier of a model would lead to. Nothing is changed by asking."""

from __future__ import annotations

from dataclasses import replace

from cached.cache.describe import Describer
from cached.cache.evictor import Evictor
from cached.cache.hot_set import HotSet
from cached.cache.registry import Model
from cached.cache.services import Services
from cached.level import Level
from cached.policy import Evict
from cached.policy import explain as policy
from cached.types import PlannedEviction, Tier, TierChange


def what_if(services: Services, evictor: Evictor, describer: Describer, model: Model, tier: Tier) -> TierChange:
    """If the operator said so; the stronger of that and the catalog counts.

    Raises NoRoomError where hot models would take more than they may, or L1 has no room that could be made.
    """
    changed = replace(model, record=replace(model.record, operator_tier=tier))
    counts = changed.tier[0]
    held_bytes = services.registry.bytes_at(model.current, Level.L1) if model.current else 0
    loaded_bytes = max(0, model.size_bytes - held_bytes) if counts is Tier.HOT else 0
    if counts is Tier.HOT and model.tier[0] is not Tier.HOT:
        HotSet(services).check(changed)
    services.storage.refresh_capacities()  # as it is done before room is made
    planned = policy.what_if(
        evictor.snapshot(), model.name, counts, services.clock.monotonic_s(), size_bytes=loaded_bytes
    )
    if planned.shortfall is not None:
        raise planned.shortfall.error()
    evictions = tuple(
        PlannedEviction(item.level, item.name, item.revision, item.frees_bytes, item.reason, item.why)
        for item in planned.actions
        if isinstance(item, Evict)
    )
    return TierChange(describer.summary(changed), evictions, loaded_bytes)
