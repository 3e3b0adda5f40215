"""The values of compile artifacts that the parts of the cache exchange. All immutable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cached.level import Level


@dataclass(frozen=True, slots=True)
class Artifact:
    """The compile cache of an engine for exactly one ``key``.

    ``archive_path`` is the file of the revision that holds it, ``sha256`` and ``size_bytes`` are the archive's.
    ``levels``: where it is on this host. ``source``: where it is at the destination; empty: not there, or not yet.
    """

    name: str
    key: Mapping[str, str]
    archive_path: str
    sha256: str
    size_bytes: int
    generation: int
    saved_time_s: float = 0.0
    last_used_time_s: float = 0.0
    levels: tuple[Level, ...] = ()
    source: str = ""
    upload_error: str = ""


@dataclass(frozen=True, slots=True)
class ArtifactFound:
    """What there is for a key: ``artifact``, or else those whose keys differ least, the nearest first."""

    name: str
    artifact: Artifact | None
    nearest: tuple[Artifact, ...]
    destination: str


@dataclass(frozen=True, slots=True)
class ArtifactOffer:
    """An archive that somebody wants to save. ``replaces_sha256``: the one that it takes the place of, if any."""

    ticket: str
    key: Mapping[str, str]
    size_bytes: int
    sha256: str
    replaces_sha256: str = ""


class PutOutcome(StrEnum):
    """What became of an offer."""

    STORED = "stored"
    SAME = "same"
    OTHER = "other"
    BUSY = "busy"
