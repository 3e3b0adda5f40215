"""The values that the client hands out. Immutable; sizes are bytes, durations seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cached_client._proto import cached_pb2 as pb


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of an attached model.

    ``sha256`` is empty until it is known. ``local_path`` is the file in the daemon's directory view, None while the
    model is still arriving or where this process does not see that directory (a container without the mount).
    """

    path: str
    size_bytes: int
    sha256: str
    local_path: Path | None = None


@dataclass(frozen=True, slots=True)
class DamagedRange:
    """Bytes of an attached file that were found damaged after they had been verified."""

    path: str
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How the daemon brought a model into memory.

    ``from_level``: where most of it came from: ``l1`` (it was there), ``l2`` (local NVMe) or ``l3`` (the origin).
    ``checked_by``: ``catalog-sha256``, ``origin-checksum`` or ``first-seen``.
    """

    from_level: str
    origin_bytes: int
    disk_bytes: int
    reused_bytes: int
    load_s: float
    checked_by: str
    partial: bool = False
    """Only what was selected is meant."""


@dataclass(frozen=True, slots=True)
class PullProgress:
    """A moment of a pull. Byte counts are of verified chunks.

    ``phase``: ``resolving``, ``transferring``, ``verifying``, ``ready``, ``accepted`` (it goes on by itself) or
    ``scheduled`` (it begins by itself).
    ``notes``: what the file selection left out and why.
    """

    phase: str
    name: str
    revision: str
    total_bytes: int
    done_bytes: int
    origin_bytes: int
    disk_bytes: int
    reused_bytes: int
    elapsed_s: float
    notes: tuple[str, ...]
    from_level: str
    checked_by: str


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A model that the daemon knows.

    ``state``: ``pulling``, ``ready``, ``quarantined``, ``partial`` or ``absent``.
    ``tier``: ``hot``, ``warm``, ``cold`` or ``auto``.
    ``progress``: 0 to 1 while it is pulled, promoted, or only partly here.
    """

    name: str
    revision: str
    state: str
    tier: str
    pinned: bool
    size_bytes: int
    l1_bytes: int
    l2_bytes: int
    file_count: int
    lease_count: int
    source: str
    progress: float


def load_report(message: pb.Complete) -> LoadReport:
    """From the wire."""
    return LoadReport(
        from_level=level_name(message.from_level),
        origin_bytes=message.origin_bytes,
        disk_bytes=message.disk_bytes,
        reused_bytes=message.reused_bytes,
        load_s=message.load_s,
        checked_by=message.checked_by,
        partial=message.partial,
    )


def pull_progress(message: pb.PullProgress) -> PullProgress:
    """From the wire."""
    return PullProgress(
        phase=_word(pb.PullProgress.Phase.Name(message.phase), "PHASE_"),
        name=message.name,
        revision=message.revision,
        total_bytes=message.total_bytes,
        done_bytes=message.done_bytes,
        origin_bytes=message.origin_bytes,
        disk_bytes=message.disk_bytes,
        reused_bytes=message.reused_bytes,
        elapsed_s=message.elapsed_s,
        notes=tuple(message.notes),
        from_level=level_name(message.from_level),
        checked_by=message.checked_by,
    )


def model_summary(message: pb.ModelSummary) -> ModelSummary:
    """From the wire."""
    return ModelSummary(
        name=message.name,
        revision=message.revision,
        state=_word(pb.RevisionState.Name(message.state), "REVISION_STATE_"),
        tier=_word(pb.Tier.Name(message.tier), "TIER_"),
        pinned=message.pinned,
        size_bytes=message.size_bytes,
        l1_bytes=message.l1_bytes,
        l2_bytes=message.l2_bytes,
        file_count=message.file_count,
        lease_count=message.lease_count,
        source=message.source,
        progress=message.progress,
    )


def level_name(level: pb.Level) -> str:
    """``l1``, ``l2``, ``l3``, or empty."""
    return _word(pb.Level.Name(level), "LEVEL_")


def _word(name: str, prefix: str) -> str:
    """``TIER_HOT`` → ``hot``; unspecified is empty."""
    word = name.removeprefix(prefix).lower()
    return "" if word == "unspecified" else word
