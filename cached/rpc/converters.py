"""Between the engine's values and the messages of ``cached.v1``. Pure; nothing else lives here.

``*_message`` makes a message of a value; ``*_of`` makes a value of what a request holds, or raises InvalidRequestError.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite, isnan
from typing import TypeVar

from cached import artifact_types, types
from cached.errors import InvalidRequestError
from cached.level import Level
from cached_client._proto import cached_pb2 as pb

LEVELS: dict[Level, pb.Level] = {
    Level.L1: pb.LEVEL_L1,
    Level.L2: pb.LEVEL_L2,
    Level.L3: pb.LEVEL_L3,
}
TIERS: dict[types.Tier, pb.Tier] = {
    types.Tier.HOT: pb.TIER_HOT,
    types.Tier.WARM: pb.TIER_WARM,
    types.Tier.COLD: pb.TIER_COLD,
    types.Tier.AUTO: pb.TIER_AUTO,
}
STATES: dict[types.RevisionState, pb.RevisionState] = {
    types.RevisionState.PULLING: pb.REVISION_STATE_PULLING,
    types.RevisionState.READY: pb.REVISION_STATE_READY,
    types.RevisionState.QUARANTINED: pb.REVISION_STATE_QUARANTINED,
    types.RevisionState.ABSENT: pb.REVISION_STATE_ABSENT,
    types.RevisionState.PARTIAL: pb.REVISION_STATE_PARTIAL,
}
PHASES: dict[types.PullPhase, pb.PullProgress.Phase] = {
    types.PullPhase.RESOLVING: pb.PullProgress.PHASE_RESOLVING,
    types.PullPhase.TRANSFERRING: pb.PullProgress.PHASE_TRANSFERRING,
    types.PullPhase.VERIFYING: pb.PullProgress.PHASE_VERIFYING,
    types.PullPhase.READY: pb.PullProgress.PHASE_READY,
    types.PullPhase.ACCEPTED: pb.PullProgress.PHASE_ACCEPTED,
    types.PullPhase.SCHEDULED: pb.PullProgress.PHASE_SCHEDULED,
}
OUTCOMES: dict[artifact_types.PutOutcome, pb.PutArtifactResponse.Outcome] = {
    artifact_types.PutOutcome.STORED: pb.PutArtifactResponse.OUTCOME_STORED,
    artifact_types.PutOutcome.SAME: pb.PutArtifactResponse.OUTCOME_SAME,
    artifact_types.PutOutcome.OTHER: pb.PutArtifactResponse.OUTCOME_OTHER,
    artifact_types.PutOutcome.BUSY: pb.PutArtifactResponse.OUTCOME_BUSY,
}
_LEVEL_OF = {number: level for level, number in LEVELS.items()}
_TIER_OF = {number: tier for tier, number in TIERS.items()}
_MAX_PATTERNS = 10_000
_MAX_PATTERN = 1024
_NAMED_BEFORE = 20
"""Of the models that would go before one: all of them would be a list of the whole host."""

_E = TypeVar("_E")


def tier_of(number: int) -> types.Tier | None:
    """The tier of a request; None when it is unspecified."""
    return _enum_of("tier", number, {int(key): value for key, value in _TIER_OF.items()})


def level_of(number: int) -> Level | None:
    """The local level of a request; None when it is unspecified. L3 cannot be asked for."""
    level = _enum_of("level", number, {int(key): value for key, value in _LEVEL_OF.items()})
    if level is Level.L3:
        msg = "the origin is not a level of this host"
        raise InvalidRequestError(msg, hint="use level l1 (shared memory) or l2 (disk)", value=level)
    return level


def seconds_of(what: str, value: float) -> float:
    """A duration of a request."""
    if not isfinite(value) or value < 0:
        msg = f"{what} is {value:g}; it must be a number of seconds, 0 or more"
        raise InvalidRequestError(msg, hint="leave it out for none", value=value)
    return value


def time_of(what: str, value: float) -> float:
    """A Unix time of a request; 0 when none was given, infinity for never."""
    if isnan(value) or value < 0:
        msg = f"{what} is {value:g}; it must be a time in seconds since 1970"
        raise InvalidRequestError(msg, hint="leave it out for now", value=value)
    return value


def selection_of(message: pb.Selection) -> types.Selection:
    """What a request selects."""
    patterns = [*message.tensors, *message.files]
    if not patterns and not message.held:
        msg = "the selection has no pattern"
        raise InvalidRequestError(msg, hint="give a pattern of tensor names or of file paths, or no selection")
    if len(patterns) > _MAX_PATTERNS or any(len(pattern) > _MAX_PATTERN for pattern in patterns):
        msg = f"a selection has at most {_MAX_PATTERNS} patterns of {_MAX_PATTERN} characters each"
        raise InvalidRequestError(msg, hint="use wildcards: model.layers.[0-9].*", value=len(patterns))
    return types.Selection(
        tensors=tuple(message.tensors),
        files=tuple(message.files),
        rest_follows=message.rest_follows,
        held=tuple(types.ByteRange(item.file_index, item.offset_bytes, item.length_bytes) for item in message.held),
    )


def _enum_of(what: str, number: int, known: dict[int, _E]) -> _E | None:
    if number == 0:
        return None
    if number not in known:
        words = ", ".join(str(value) for value in known.values())
        msg = f"{number} is not a {what}"
        raise InvalidRequestError(
            msg, hint=f"use one of {words}; a newer client may know more than this daemon", value=number
        )
    return known[number]


def text(value: str) -> str:
    """Text that protobuf accepts: what came from file names may hold lone surrogates."""
    return value.encode("utf-8", "replace").decode()


def progress_message(value: types.PullProgress) -> pb.PullProgress:
    """A moment of a pull."""
    return pb.PullProgress(
        phase=PHASES[value.phase],
        name=value.name,
        revision=value.revision,
        total_bytes=value.total_bytes,
        done_bytes=value.done_bytes,
        origin_bytes=value.origin_bytes,
        disk_bytes=value.disk_bytes,
        reused_bytes=value.reused_bytes,
        elapsed_s=value.elapsed_s,
        notes=[text(note) for note in value.notes],
        from_level=_level_number(value.from_level),
        checked_by=value.checked_by or "",
    )


def attach_message(value: types.AttachEvent, descriptor_socket: str) -> pb.AttachResponse:
    """One event of an attach. ``descriptor_socket`` goes into the first one."""
    match value:
        case types.Opened():
            return pb.AttachResponse(opened=_opened_message(value, descriptor_socket))
        case types.RangesReady():
            ranges = [
                pb.RangesReady.Range(
                    file_index=item.file_index, offset_bytes=item.offset_bytes, length_bytes=item.length_bytes
                )
                for item in value.ranges
            ]
            return pb.AttachResponse(ranges_ready=pb.RangesReady(ranges=ranges))
        case types.Complete():
            return pb.AttachResponse(complete=_complete_message(value))
        case types.Damaged():
            damaged = pb.Damaged(
                file_index=value.file_index, offset_bytes=value.offset_bytes, length_bytes=value.length_bytes
            )
            return pb.AttachResponse(damaged=damaged)


def _opened_message(value: types.Opened, descriptor_socket: str) -> pb.Opened:
    files = [
        pb.ModelFile(index=item.index, path=item.path, size_bytes=item.size_bytes, sha256=item.sha256)
        for item in value.files
    ]
    return pb.Opened(
        lease_id=value.lease_id,
        token=value.token,
        name=value.name,
        revision=value.revision,
        files=files,
        descriptor_socket=descriptor_socket,
        complete=None if value.complete is None else _complete_message(value.complete),
        selected=None if value.selected is None else _selected_message(value.selected),
    )


def _selected_message(value: types.Selected) -> pb.Selected:
    tensors = [
        pb.Selected.Tensor(
            file_index=item.file_index, name=item.name, dtype=item.dtype, shape=item.shape, begin=item.begin,
            end=item.end,
        )
        for item in value.tensors
    ]  # fmt: skip
    return pb.Selected(tensors=tensors, files=value.files)


def _complete_message(value: types.Complete) -> pb.Complete:
    return pb.Complete(
        from_level=LEVELS[value.from_level],
        origin_bytes=value.origin_bytes,
        disk_bytes=value.disk_bytes,
        reused_bytes=value.reused_bytes,
        load_s=value.load_s,
        checked_by=value.checked_by,
        partial=value.partial,
    )


def summary_message(value: types.ModelSummary) -> pb.ModelSummary:
    """A row of ``cached ls``."""
    return pb.ModelSummary(
        name=value.name,
        revision=value.revision,
        state=STATES[value.state],
        tier=TIERS[value.tier],
        tier_from=value.tier_from,
        pinned=value.pinned,
        size_bytes=value.size_bytes,
        l1_bytes=value.l1_bytes,
        l2_bytes=value.l2_bytes,
        file_count=value.file_count,
        lease_count=value.lease_count,
        source=text(value.source),
        last_used_time_s=value.last_used_time_s,
        checked_by=value.checked_by or "",
        progress=value.progress,
        priority=value.priority,
        worth_s=value.worth_s,
        transient=value.transient,
        tenant=value.tenant,
        base=value.base,
    )


def detail_message(value: types.ModelDetail) -> pb.DescribeResponse:
    """All of ``cached show``."""
    files = [
        pb.FileDetail(
            path=item.path,
            size_bytes=item.size_bytes,
            sha256=item.sha256,
            in_l1=item.in_l1,
            in_l2=item.in_l2,
            shared_with=item.shared_with,
            chunk_count=item.chunk_count,
            checked_by=item.checked_by or "",
        )
        for item in value.files
    ]
    return pb.DescribeResponse(
        summary=summary_message(value.summary),
        files=files,
        revisions=value.revisions,
        path=text(value.path),
        leases=[lease_message(lease) for lease in value.leases],
        notes=[text(note) for note in (*value.notes, *([f"seen by {value.access}"] if value.access else ()))],
        last_error=text(value.last_error),
        places=[_place_message(place) for place in value.places],
        schedule=value.schedule,
        schedule_change_time_s=value.schedule_change_time_s,
        pull_times_s=value.pull_times_s,
    )


def _place_message(value: types.PlaceDetail) -> pb.Place:
    return pb.Place(
        level=LEVELS[value.level],
        held_bytes=value.held_bytes,
        worth_s=value.worth_s,
        requests=value.requests,
        reload_s=value.reload_s,
        why=text(value.why),
        evicted_before=value.evicted_before[:_NAMED_BEFORE],
        evicted_before_count=len(value.evicted_before),
        verified_time_s=value.verified_time_s,
    )


def tier_change_message(value: types.TierChange) -> pb.SetTierResponse:
    """What another tier would lead to."""
    evictions = [
        pb.Eviction(
            level=LEVELS[item.level],
            name=item.name,
            revision=item.revision,
            frees_bytes=item.frees_bytes,
            reason=item.reason,
            why=text(item.why),
        )
        for item in value.evictions
    ]
    return pb.SetTierResponse(
        summary=summary_message(value.summary), evictions=evictions, loaded_bytes=value.loaded_bytes
    )


def trace_message(rows: Iterable[types.Attached]) -> pb.TraceResponse:
    """Some rows of the host's trace."""
    return pb.TraceResponse(
        rows=[
            pb.TraceRow(time_s=row.time_s, model=row.model, size_bytes=row.size_bytes, lease_s=row.lease_s)
            for row in rows
        ]
    )


def lease_message(value: types.LeaseInfo) -> pb.Lease:
    """A lease; the peer's ids are -1 until its credentials are known."""
    return pb.Lease(
        lease_id=value.lease_id,
        name=value.name,
        revision=value.revision,
        client_name=value.client.name,
        client_pid=value.client.pid,
        peer_pid=-1 if value.peer is None else value.peer.pid,
        peer_uid=-1 if value.peer is None else value.peer.uid,
        since_time_s=value.since_time_s,
        complete=value.complete,
        size_bytes=value.size_bytes,
        process=text(value.peer.process) if value.peer else "",
        container=text(value.peer.container) if value.peer else "",
    )


def verify_message(value: types.VerifyProgress) -> pb.VerifyResponse:
    """A moment of a verification."""
    damage = None
    if value.damage is not None:
        found = value.damage
        damage = pb.Damage(
            name=found.name,
            revision=found.revision,
            path=found.path,
            sha256=found.sha256,
            level=LEVELS[found.level],
            chunk_index=found.chunk_index,
            offset_bytes=found.offset_bytes,
            length_bytes=found.length_bytes,
            repaired=found.repaired,
            error=text(found.error),
        )
    return pb.VerifyResponse(
        total_bytes=value.total_bytes,
        done_bytes=value.done_bytes,
        damage=damage,
        finished=value.finished,
        damaged_chunks=value.damaged_chunks,
        repaired_chunks=value.repaired_chunks,
    )


def stats_message(value: types.Stats) -> pb.StatsResponse:
    """The daemon at a glance."""
    levels = [
        pb.LevelStats(
            level=LEVELS[item.level],
            capacity_bytes=item.capacity_bytes,
            used_bytes=item.used_bytes,
            reserved_bytes=item.reserved_bytes,
            withdrawn_bytes=item.withdrawn_bytes,
            pool_bytes=item.pool_bytes,
            blob_count=item.blob_count,
            limited_by=text(item.limited_by),
            transient_bytes=item.transient_bytes,
            hot_bytes=item.hot_bytes,
            hot_capacity_bytes=item.hot_capacity_bytes,
            longest_unverified_s=item.longest_unverified_s,
        )
        for item in value.levels
    ]
    return pb.StatsResponse(
        levels=levels,
        counters=value.counters,
        lease_count=value.lease_count,
        model_count=value.model_count,
        active_load_count=value.active_load_count,
        mover_count=value.mover_count,
        uptime_s=value.uptime_s,
        version=value.version,
        degraded=[text(item) for item in value.degraded],
        instance=value.instance,
        scrub=pb.Scrub(
            bytes_per_s=value.scrub.bytes_per_s,
            total_bytes=value.scrub.total_bytes,
            done_bytes=value.scrub.done_bytes,
            waiting=value.scrub.waiting,
        ),
    )


def event_message(value: types.Event) -> pb.Event:
    """Something that happened."""
    return pb.Event(
        time_s=value.time_s,
        kind=value.kind,
        name=value.name,
        revision=value.revision,
        message=text(value.message),
        fields={key: text(item) for key, item in value.fields.items()},
    )


def _level_number(level: Level | None) -> pb.Level:
    return pb.LEVEL_UNSPECIFIED if level is None else LEVELS[level]


def artifact_message(value: artifact_types.Artifact) -> pb.Artifact:
    """A compile artifact."""
    return pb.Artifact(
        name=value.name,
        key=dict(value.key),
        archive_path=value.archive_path,
        sha256=value.sha256,
        size_bytes=value.size_bytes,
        generation=value.generation,
        saved_time_s=value.saved_time_s,
        last_used_time_s=value.last_used_time_s,
        levels=[LEVELS[level] for level in value.levels],
        source=value.source,
        upload_error=value.upload_error,
    )


def found_message(value: artifact_types.ArtifactFound, descriptor_socket: str) -> pb.FindArtifactResponse:
    """What there is for a key."""
    return pb.FindArtifactResponse(
        name=value.name,
        artifact=artifact_message(value.artifact) if value.artifact else None,
        nearest=map(artifact_message, value.nearest),
        descriptor_socket=descriptor_socket,
        destination=value.destination,
    )


def offer_of(message: pb.ArtifactOffer) -> artifact_types.ArtifactOffer:
    """An offer; the engine checks what it says."""
    return artifact_types.ArtifactOffer(
        ticket=message.ticket,
        key=dict(message.key),
        size_bytes=message.size_bytes,
        sha256=message.sha256,
        replaces_sha256=message.replaces_sha256,
    )


def put_message(outcome: artifact_types.PutOutcome, artifact: artifact_types.Artifact | None) -> pb.PutArtifactResponse:
    """What became of an offer."""
    return pb.PutArtifactResponse(outcome=OUTCOMES[outcome], artifact=artifact_message(artifact) if artifact else None)
