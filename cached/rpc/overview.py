"""Overviews, between the wire and values: made by the daemon, read by `cached top`. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from enum import StrEnum
from typing import TypeVar

from cached import types
from cached.level import Level
from cached.overview import Holding, LevelUse, Limits, Move, MoveKind, MovePhase, Overview, Problem
from cached.rpc.coldstart import cold_start_message
from cached.rpc.converters import (
    LEVELS,
    STATES,
    TIERS,
    event_message,
    lease_message,
    stats_message,
    summary_message,
    text,
)
from cached_client._proto import cached_pb2 as pb

_MOST = Limits(models=10_000, leases=10_000, events=100, moves=1000, cold_starts=1000)
_LEVEL_OF: Mapping[int, Level] = {number: level for level, number in LEVELS.items()}
_STATE_OF: Mapping[int, types.RevisionState] = {number: state for state, number in STATES.items()}
_TIER_OF: Mapping[int, types.Tier] = {number: tier for tier, number in TIERS.items()}

_W = TypeVar("_W", bound=StrEnum)


def limits_of(message: pb.OverviewRequest) -> Limits:
    """How much is asked for: at most what one answer may hold, and by itself what suits a screen."""
    usual = Limits()
    return Limits(
        models=min(message.models or usual.models, _MOST.models),
        leases=min(message.leases or usual.leases, _MOST.leases),
        events=min(message.events or usual.events, _MOST.events),
        moves=min(message.moves or usual.moves, _MOST.moves),
        cold_starts=min(message.cold_starts or usual.cold_starts, _MOST.cold_starts),
    )


def overview_message(value: Overview) -> pb.OverviewResponse:
    """One look at everything."""
    return pb.OverviewResponse(
        time_s=value.time_s,
        stats=stats_message(value.stats),
        uses=[
            pb.LevelUse(
                level=LEVELS[use.level],
                holdings_bytes={key.value: size_bytes for key, size_bytes in use.holdings_bytes.items()},
                leased_bytes=use.leased_bytes,
            )
            for use in value.uses
        ],
        models=map(summary_message, value.models),
        model_count=value.model_count,
        moves=map(_move_message, value.moves),
        move_count=value.move_count,
        leases=map(lease_message, value.leases),
        events=map(event_message, value.events),
        cold_starts=map(cold_start_message, value.cold_starts),
        problems=[pb.Problem(about=item.about, message=text(item.message), name=item.name) for item in value.problems],
    )


def _move_message(value: Move) -> pb.Move:
    return pb.Move(
        kind=value.kind,
        phase=value.phase,
        name=value.name,
        revision=value.revision,
        level=LEVELS[value.level],
        source=text(value.source),
        total_bytes=value.total_bytes,
        done_bytes=value.done_bytes,
        behind_total_bytes=value.behind_total_bytes,
        behind_bytes=value.behind_bytes,
        speed_bytes_per_s=value.speed_bytes_per_s,
        elapsed_s=value.elapsed_s,
        waiting=map(text, value.waiting),
        waiting_count=value.waiting_count,
        partial=value.partial,
    )


def overview_of(message: pb.OverviewResponse) -> Overview:
    """What a daemon answered, also one that knows more words than we. Starts of workers stay behind."""
    return Overview(
        time_s=message.time_s,
        stats=_stats_of(message.stats),
        uses=tuple(
            LevelUse(_LEVEL_OF.get(use.level, Level.L3), _holdings_of(use.holdings_bytes), use.leased_bytes)
            for use in message.uses
        ),
        models=tuple(map(_summary_of, message.models)),
        model_count=message.model_count,
        moves=tuple(map(_move_of, message.moves)),
        move_count=message.move_count,
        leases=tuple(map(_lease_of, message.leases)),
        events=tuple(map(_event_of, message.events)),
        problems=tuple(Problem(item.about, item.message, item.name) for item in message.problems),
    )


def _holdings_of(message: Mapping[str, int]) -> dict[Holding, int]:
    return {holding: message.get(holding.value, 0) for holding in Holding}


def _word(kind: type[_W], value: str, otherwise: _W) -> _W:
    with suppress(ValueError):
        return kind(value)
    return otherwise


def _move_of(message: pb.Move) -> Move:
    return Move(
        kind=_word(MoveKind, message.kind, MoveKind.PULL),
        phase=_word(MovePhase, message.phase, MovePhase.MOVING),
        name=message.name,
        revision=message.revision,
        level=_LEVEL_OF.get(message.level, Level.L1),
        source=message.source,
        total_bytes=message.total_bytes,
        done_bytes=message.done_bytes,
        behind_total_bytes=message.behind_total_bytes,
        behind_bytes=message.behind_bytes,
        speed_bytes_per_s=message.speed_bytes_per_s,
        elapsed_s=message.elapsed_s,
        waiting=tuple(message.waiting),
        waiting_count=message.waiting_count,
        partial=message.partial,
    )


def _stats_of(message: pb.StatsResponse) -> types.Stats:
    return types.Stats(
        levels=tuple(map(_level_of, message.levels)),
        counters=dict(message.counters),
        lease_count=message.lease_count,
        model_count=message.model_count,
        active_load_count=message.active_load_count,
        mover_count=message.mover_count,
        uptime_s=message.uptime_s,
        version=message.version,
        degraded=tuple(message.degraded),
        instance=message.instance,
        scrub=types.ScrubStats(
            message.scrub.bytes_per_s, message.scrub.total_bytes, message.scrub.done_bytes, message.scrub.waiting
        ),
    )


def _level_of(message: pb.LevelStats) -> types.LevelStats:
    return types.LevelStats(
        level=_LEVEL_OF.get(message.level, Level.L3),
        capacity_bytes=message.capacity_bytes,
        used_bytes=message.used_bytes,
        reserved_bytes=message.reserved_bytes,
        withdrawn_bytes=message.withdrawn_bytes,
        pool_bytes=message.pool_bytes,
        blob_count=message.blob_count,
        limited_by=message.limited_by,
        transient_bytes=message.transient_bytes,
        hot_bytes=message.hot_bytes,
        hot_capacity_bytes=message.hot_capacity_bytes,
        longest_unverified_s=message.longest_unverified_s,
    )


def _summary_of(message: pb.ModelSummary) -> types.ModelSummary:
    return types.ModelSummary(
        name=message.name,
        revision=message.revision,
        state=_STATE_OF.get(message.state, types.RevisionState.ABSENT),
        tier=_TIER_OF.get(message.tier, types.Tier.AUTO),
        tier_from=message.tier_from,
        pinned=message.pinned,
        size_bytes=message.size_bytes,
        l1_bytes=message.l1_bytes,
        l2_bytes=message.l2_bytes,
        file_count=message.file_count,
        lease_count=message.lease_count,
        source=message.source,
        last_used_time_s=message.last_used_time_s,
        checked_by=_check_of(message.checked_by),
        progress=message.progress,
        priority=message.priority,
        worth_s=message.worth_s,
        transient=message.transient,
        tenant=message.tenant,
        base=message.base,
    )


def _check_of(message: str) -> types.CheckedBy | None:
    return _word(types.CheckedBy, message, types.CheckedBy.FIRST_SEEN) if message else None


def _lease_of(message: pb.Lease) -> types.LeaseInfo:
    peer = types.Peer(message.peer_pid, message.peer_uid, -1, message.process, message.container)
    return types.LeaseInfo(
        lease_id=message.lease_id,
        name=message.name,
        revision=message.revision,
        client=types.Client(message.client_name, message.client_pid),
        peer=peer if message.peer_uid >= 0 else None,
        since_time_s=message.since_time_s,
        complete=message.complete,
        size_bytes=message.size_bytes,
    )


def _event_of(message: pb.Event) -> types.Event:
    return types.Event(
        message.time_s, message.kind, message.name, message.revision, message.message, dict(message.fields)
    )
