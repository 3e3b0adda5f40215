"""Runs policies over a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from cached.errors import InvalidRequestError
from cached.simulate.bound import least_cold_start_s
from cached.simulate.gdsf import GdsfKeeper
from cached.simulate.host import Host, Keeper
from cached.simulate.lru import LruKeeper
from cached.simulate.ours import OurKeeper
from cached.simulate.outcome import Outcome, bound_of, outcome_of
from cached.simulate.setup import Setup
from cached.simulate.trace import Row

_KEEPERS: Mapping[str, Callable[[Setup, frozenset[str], Mapping[str, int]], Keeper]] = {
    "default": OurKeeper,
    "lru": LruKeeper,
    "gdsf": GdsfKeeper,
}
_BOUND = "bound"
POLICIES = (*_KEEPERS, _BOUND)
"""The daemon's own policy, two baselines, and the bound of what any could do."""


def simulate(setup: Setup, rows: Sequence[Row], policy: str) -> Outcome:
    """Plays a trace, whose rows are in order of time, under one of POLICIES; deterministic.

    Raises InvalidRequestError for another policy, and for hot models that L1 cannot hold.
    """
    if policy not in POLICIES:
        raise InvalidRequestError(
            f"there is no policy {policy!r}", hint=f"choose among {', '.join(POLICIES)}", value=policy
        )
    trace = list(rows)
    sizes: dict[str, int] = {}
    for row in trace:
        sizes.setdefault(row.model, row.size_bytes)
    preloaded = setup.preloaded_of(sizes)
    if policy == _BOUND:
        return bound_of(setup, trace, preloaded, least_cold_start_s(setup, trace, preloaded))
    keeper = _KEEPERS[policy](setup, preloaded, sizes)
    host = Host(setup, keeper, preloaded)
    sources = [host.attach(row) for row in trace]
    return outcome_of(
        setup, trace, sources, preloaded, evictions=keeper.evictions, prefetched_bytes=keeper.prefetched_bytes
    )
