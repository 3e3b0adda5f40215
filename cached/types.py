"""The values that the parts of the cache exchange. Standard library only; all immutable unless said otherwise.

Words are those of docs/architecture.md: a *level* is where bytes are, a *tier* is how soon a model is wanted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from cached.level import Level


class Tier(StrEnum):
    """How soon a model is wanted."""

    HOT = "hot"
    WARM = "warm"
    COLD = "cold"
    AUTO = "auto"


class RevisionState(StrEnum):
    """What a revision can be used for now."""

    PULLING = "pulling"
    READY = "ready"
    QUARANTINED = "quarantined"
    ABSENT = "absent"
    PARTIAL = "partial"


class CheckedBy(StrEnum):
    """What content was checked against when it came, strongest first."""

    CATALOG_SHA256 = "catalog-sha256"
    ORIGIN_CHECKSUM = "origin-checksum"
    FIRST_SEEN = "first-seen"


class PullPhase(StrEnum):
    """Where a pull stands."""

    RESOLVING = "resolving"
    TRANSFERRING = "transferring"
    VERIFYING = "verifying"
    READY = "ready"
    ACCEPTED = "accepted"
    SCHEDULED = "scheduled"


@dataclass(frozen=True, slots=True)
class PullProgress:
    """A moment of a pull or promotion; byte counts are of verified chunks."""

    phase: PullPhase
    name: str
    revision: str = ""
    total_bytes: int = 0
    done_bytes: int = 0
    origin_bytes: int = 0
    disk_bytes: int = 0
    reused_bytes: int = 0
    elapsed_s: float = 0.0
    notes: tuple[str, ...] = ()
    from_level: Level | None = None
    checked_by: CheckedBy | None = None


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Verified bytes ``[offset_bytes, offset_bytes + length_bytes)`` of file ``file_index`` of an attach."""

    file_index: int
    offset_bytes: int
    length_bytes: int


@dataclass(frozen=True, slots=True)
class AttachedFile:
    """A file of an attached revision. ``sha256`` is empty until it is known."""

    index: int
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Selection:
    """What of a model an attach asks for: patterns (fnmatch, case counts) of tensor names and of file paths.

    ``rest_follows``: the whole model is brought, this before everything else. ``held``: for a lease that is taken up
    again, the ranges that it was told of, instead of patterns.
    """

    tensors: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    rest_follows: bool = False
    held: tuple[ByteRange, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectedTensor:
    """A tensor that a selection matches: bytes ``[begin, end)`` of file ``file_index``."""

    file_index: int
    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Selected:
    """What a selection matches: tensors in the order of files and bytes, and the files that are selected whole."""

    tensors: tuple[SelectedTensor, ...] = ()
    files: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Opened:
    """First event of an attach. ``complete`` is set when nothing has to be moved.

    ``selected`` is set when only a selection was asked for: nothing else may be read.
    """

    lease_id: str
    token: str
    name: str
    revision: str
    files: tuple[AttachedFile, ...]
    complete: Complete | None = None
    selected: Selected | None = None


@dataclass(frozen=True, slots=True)
class RangesReady:
    """These ranges may be read now."""

    ranges: tuple[ByteRange, ...]


@dataclass(frozen=True, slots=True)
class Complete:
    """The revision is in L1 and its strongest check has passed; with ``partial`` only what was selected of it."""

    from_level: Level
    origin_bytes: int
    disk_bytes: int
    reused_bytes: int
    load_s: float
    checked_by: CheckedBy
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Damaged:
    """A range that this lease maps was found damaged in L1; a new attach gets a clean copy."""

    file_index: int
    offset_bytes: int
    length_bytes: int


AttachEvent = Opened | RangesReady | Complete | Damaged


@dataclass(frozen=True, slots=True)
class Client:
    """Who asks, by its own word (``cached ps`` shows it); the peer's credentials come from the descriptor socket."""

    name: str = ""
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """Credentials of a connected process, from SO_PEERCRED, and what /proc tells of it, if anything."""

    pid: int
    uid: int
    gid: int
    process: str = ""
    container: str = ""


@dataclass(frozen=True, slots=True)
class LeaseInfo:
    """A lease as shown to people."""

    lease_id: str
    name: str
    revision: str
    client: Client
    peer: Peer | None
    since_time_s: float
    complete: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """A row of ``cached ls``."""

    name: str
    revision: str
    state: RevisionState
    tier: Tier
    tier_from: str
    pinned: bool
    size_bytes: int
    l1_bytes: int
    l2_bytes: int
    file_count: int
    lease_count: int
    source: str
    last_used_time_s: float
    checked_by: CheckedBy | None
    progress: float
    priority: int
    worth_s: float = 0.0
    """Waiting that its being in L1, else in L2, is expected to spare in the next six hours."""
    transient: bool = False
    """In L1 beside the budget, until its last lease ends."""
    tenant: str = ""
    base: str = ""
    """The model that it is an adapter of."""


@dataclass(frozen=True, slots=True)
class FileDetail:
    """A file of ``cached show``."""

    path: str
    size_bytes: int
    sha256: str
    in_l1: bool
    in_l2: bool
    shared_with: tuple[str, ...]
    chunk_count: int
    checked_by: CheckedBy | None


@dataclass(frozen=True, slots=True)
class ModelDetail:
    """All of ``cached show``. ``path`` is the directory of links, empty while the model is at no local level."""

    summary: ModelSummary
    files: tuple[FileDetail, ...]
    revisions: tuple[str, ...]
    path: str
    leases: tuple[LeaseInfo, ...]
    notes: tuple[str, ...]
    last_error: str
    places: tuple[PlaceDetail, ...] = ()
    schedule: tuple[str, ...] = ()
    schedule_change_time_s: float = 0.0
    """When it becomes hot by its schedule, or stops being so; 0 without one."""
    pull_times_s: tuple[float, ...] = ()
    access: str = ""
    """Whom its access list lets know of it, for people; empty without one."""


@dataclass(frozen=True, slots=True)
class PlaceDetail:
    """Why a revision is at a level, or not. ``worth_s`` is ``requests`` expected in six hours times ``reload_s``.

    ``evicted_before``: models that would go before it, the first to go first.
    """

    level: Level
    held_bytes: int
    worth_s: float
    requests: float
    reload_s: float
    why: str
    evicted_before: tuple[str, ...]
    verified_time_s: float = 0.0
    """When all of it that is there was last found right; 0: some of it never was, or nothing is there."""


@dataclass(frozen=True, slots=True)
class PlannedEviction:
    """What would leave a level, and why. ``reason`` is a stable word, ``why`` the same for people."""

    level: Level
    name: str
    revision: str
    frees_bytes: int
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class TierChange:
    """What another tier would lead to. ``loaded_bytes``: what would be brought to L1."""

    summary: ModelSummary
    evictions: tuple[PlannedEviction, ...]
    loaded_bytes: int


@dataclass(frozen=True, slots=True)
class Attached:
    """An attach in the host's own trace. ``lease_s`` is 0 while it is held."""

    time_s: float
    model: str
    size_bytes: int
    lease_s: float


@dataclass(frozen=True, slots=True)
class Freed:
    """Bytes that left each level. In L1 they count as used until the kernel says that nobody maps them."""

    l1_bytes: int = 0
    l2_bytes: int = 0

    def plus(self, level: Level, size_bytes: int) -> Freed:
        """With what left this level besides."""
        if level is Level.L1:
            return Freed(self.l1_bytes + size_bytes, self.l2_bytes)
        return Freed(self.l1_bytes, self.l2_bytes + size_bytes)


@dataclass(frozen=True, slots=True)
class Damage:
    """One damaged chunk that verification found."""

    name: str
    revision: str
    path: str
    sha256: str
    level: Level
    chunk_index: int
    offset_bytes: int
    length_bytes: int
    repaired: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """A moment of ``cached verify``."""

    total_bytes: int
    done_bytes: int
    damage: Damage | None
    finished: bool
    damaged_chunks: int
    repaired_chunks: int


@dataclass(frozen=True, slots=True)
class LevelStats:
    """Bytes at a level. ``used_bytes`` includes withdrawn, pool and transient bytes, ``capacity_bytes`` the latter.

    ``hot_bytes``: what hot models take once all of them are there, and ``hot_capacity_bytes`` what they may.
    """

    level: Level
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    withdrawn_bytes: int
    pool_bytes: int
    blob_count: int
    limited_by: str
    transient_bytes: int = 0
    hot_bytes: int = 0
    hot_capacity_bytes: int = 0
    longest_unverified_s: float = 0.0
    """For how long the blob that waits longest for a look has not been verified."""


@dataclass(frozen=True, slots=True)
class ScrubStats:
    """The scrubber. ``total_bytes``: of the session under way, 0 between sessions. ``waiting``: for loads to end."""

    bytes_per_s: int = 0
    """How fast it reads; 0: it is switched off."""
    total_bytes: int = 0
    done_bytes: int = 0
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class OriginStats:
    """Ranges of one origin: in flight now, waiting for their turn, and how many are in flight at most, as measured."""

    name: str
    in_flight: int
    waiting: int
    width: int


@dataclass(frozen=True, slots=True)
class Stats:
    """The daemon at a glance. ``degraded`` is empty when all is well."""

    levels: tuple[LevelStats, ...]
    counters: dict[str, float]
    lease_count: int
    model_count: int
    active_load_count: int
    mover_count: int
    uptime_s: float
    version: str
    degraded: tuple[str, ...]
    instance: str
    origins: tuple[OriginStats, ...] = ()
    scrub: ScrubStats = ScrubStats()
    prediction_precision: float | None = None
    """The share of predictions from habit that came true; None before the first was judged."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened; ``kind`` is a stable dotted word."""

    time_s: float
    kind: str
    name: str = ""
    revision: str = ""
    message: str = ""
    fields: dict[str, str] = field(default_factory=dict)


COLD_START_PHASES = (
    "container_start", "process_start", "imports", "attach", "download", "promote", "verify", "weights_to_gpu",
    "cuda_init", "compile", "warmup", "first_inference",
)  # fmt: skip
"""The phases of a worker's start that have names of their own in the metrics."""


@dataclass(frozen=True, slots=True)
class ColdStartPhase:
    """A stretch of time of a worker's start. ``parent``: index of the phase that it is a part of, a lower one."""

    name: str
    start_s: float
    end_s: float
    parent: int | None = None
    after: str = ""
    running: bool = False
    failed: bool = False


@dataclass(frozen=True, slots=True)
class ColdStart:
    """How one start of a worker went, as the worker told it."""

    name: str
    revision: str
    client_name: str
    started_time_s: float
    total_s: float
    phases: tuple[ColdStartPhase, ...]
    labels: dict[str, str] = field(default_factory=dict)
    reported_time_s: float = 0.0
