# Generated from proto/cached/v1/cached.proto by `make proto`. Do not edit.
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import Any as _Any, ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Level(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LEVEL_UNSPECIFIED: _ClassVar[Level]
    LEVEL_L1: _ClassVar[Level]
    LEVEL_L2: _ClassVar[Level]
    LEVEL_L3: _ClassVar[Level]

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_HOT: _ClassVar[Tier]
    TIER_WARM: _ClassVar[Tier]
    TIER_COLD: _ClassVar[Tier]
    TIER_AUTO: _ClassVar[Tier]

class RevisionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REVISION_STATE_UNSPECIFIED: _ClassVar[RevisionState]
    REVISION_STATE_PULLING: _ClassVar[RevisionState]
    REVISION_STATE_READY: _ClassVar[RevisionState]
    REVISION_STATE_QUARANTINED: _ClassVar[RevisionState]
    REVISION_STATE_ABSENT: _ClassVar[RevisionState]
    REVISION_STATE_PARTIAL: _ClassVar[RevisionState]
LEVEL_UNSPECIFIED: Level
LEVEL_L1: Level
LEVEL_L2: Level
LEVEL_L3: Level
TIER_UNSPECIFIED: Tier
TIER_HOT: Tier
TIER_WARM: Tier
TIER_COLD: Tier
TIER_AUTO: Tier
REVISION_STATE_UNSPECIFIED: RevisionState
REVISION_STATE_PULLING: RevisionState
REVISION_STATE_READY: RevisionState
REVISION_STATE_QUARANTINED: RevisionState
REVISION_STATE_ABSENT: RevisionState
REVISION_STATE_PARTIAL: RevisionState

class PullRequest(_message.Message):
    __slots__ = ("ref", "source", "tier", "level", "no_wait", "at_time_s")
    REF_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    NO_WAIT_FIELD_NUMBER: _ClassVar[int]
    AT_TIME_S_FIELD_NUMBER: _ClassVar[int]
    ref: str
    source: str
    tier: Tier
    level: Level
    no_wait: bool
    at_time_s: float
    def __init__(self, ref: _Optional[str] = ..., source: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., level: _Optional[_Union[Level, str]] = ..., no_wait: bool = ..., at_time_s: _Optional[float] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("progress",)
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    progress: PullProgress
    def __init__(self, progress: _Optional[_Union[PullProgress, _Mapping[str, _Any]]] = ...) -> None: ...

class PullProgress(_message.Message):
    __slots__ = ("phase", "name", "revision", "total_bytes", "done_bytes", "origin_bytes", "disk_bytes", "reused_bytes", "elapsed_s", "notes", "from_level", "checked_by")
    class Phase(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        PHASE_UNSPECIFIED: _ClassVar[PullProgress.Phase]
        PHASE_RESOLVING: _ClassVar[PullProgress.Phase]
        PHASE_TRANSFERRING: _ClassVar[PullProgress.Phase]
        PHASE_VERIFYING: _ClassVar[PullProgress.Phase]
        PHASE_READY: _ClassVar[PullProgress.Phase]
        PHASE_ACCEPTED: _ClassVar[PullProgress.Phase]
        PHASE_SCHEDULED: _ClassVar[PullProgress.Phase]
    PHASE_UNSPECIFIED: PullProgress.Phase
    PHASE_RESOLVING: PullProgress.Phase
    PHASE_TRANSFERRING: PullProgress.Phase
    PHASE_VERIFYING: PullProgress.Phase
    PHASE_READY: PullProgress.Phase
    PHASE_ACCEPTED: PullProgress.Phase
    PHASE_SCHEDULED: PullProgress.Phase
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REUSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    FROM_LEVEL_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BY_FIELD_NUMBER: _ClassVar[int]
    phase: PullProgress.Phase
    name: str
    revision: str
    total_bytes: int
    done_bytes: int
    origin_bytes: int
    disk_bytes: int
    reused_bytes: int
    elapsed_s: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    from_level: Level
    checked_by: str
    def __init__(self, phase: _Optional[_Union[PullProgress.Phase, str]] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., total_bytes: _Optional[int] = ..., done_bytes: _Optional[int] = ..., origin_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., reused_bytes: _Optional[int] = ..., elapsed_s: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ..., from_level: _Optional[_Union[Level, str]] = ..., checked_by: _Optional[str] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("ref", "source", "client_name", "client_pid", "resume", "only_if_resident", "keep_alive_s", "selection")
    REF_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PID_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    ONLY_IF_RESIDENT_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_S_FIELD_NUMBER: _ClassVar[int]
    SELECTION_FIELD_NUMBER: _ClassVar[int]
    ref: str
    source: str
    client_name: str
    client_pid: int
    resume: bool
    only_if_resident: bool
    keep_alive_s: float
    selection: Selection
    def __init__(self, ref: _Optional[str] = ..., source: _Optional[str] = ..., client_name: _Optional[str] = ..., client_pid: _Optional[int] = ..., resume: bool = ..., only_if_resident: bool = ..., keep_alive_s: _Optional[float] = ..., selection: _Optional[_Union[Selection, _Mapping[str, _Any]]] = ...) -> None: ...

class Selection(_message.Message):
    __slots__ = ("tensors", "files", "rest_follows", "held")
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    REST_FOLLOWS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedScalarFieldContainer[str]
    files: _containers.RepeatedScalarFieldContainer[str]
    rest_follows: bool
    held: _containers.RepeatedCompositeFieldContainer[RangesReady.Range]
    def __init__(self, tensors: _Optional[_Iterable[str]] = ..., files: _Optional[_Iterable[str]] = ..., rest_follows: bool = ..., held: _Optional[_Iterable[_Union[RangesReady.Range, _Mapping[str, _Any]]]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("opened", "ranges_ready", "complete", "damaged", "keep_alive")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RANGES_READY_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    KEEP_ALIVE_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    ranges_ready: RangesReady
    complete: Complete
    damaged: Damaged
    keep_alive: KeepAlive
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping[str, _Any]]] = ..., ranges_ready: _Optional[_Union[RangesReady, _Mapping[str, _Any]]] = ..., complete: _Optional[_Union[Complete, _Mapping[str, _Any]]] = ..., damaged: _Optional[_Union[Damaged, _Mapping[str, _Any]]] = ..., keep_alive: _Optional[_Union[KeepAlive, _Mapping[str, _Any]]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("lease_id", "token", "name", "revision", "files", "descriptor_socket", "complete", "selected")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SELECTED_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    token: str
    name: str
    revision: str
    files: _containers.RepeatedCompositeFieldContainer[ModelFile]
    descriptor_socket: str
    complete: Complete
    selected: Selected
    def __init__(self, lease_id: _Optional[str] = ..., token: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., files: _Optional[_Iterable[_Union[ModelFile, _Mapping[str, _Any]]]] = ..., descriptor_socket: _Optional[str] = ..., complete: _Optional[_Union[Complete, _Mapping[str, _Any]]] = ..., selected: _Optional[_Union[Selected, _Mapping[str, _Any]]] = ...) -> None: ...

class Selected(_message.Message):
    __slots__ = ("tensors", "files")
    class Tensor(_message.Message):
        __slots__ = ("file_index", "name", "dtype", "shape", "begin", "end")
        FILE_INDEX_FIELD_NUMBER: _ClassVar[int]
        NAME_FIELD_NUMBER: _ClassVar[int]
        DTYPE_FIELD_NUMBER: _ClassVar[int]
        SHAPE_FIELD_NUMBER: _ClassVar[int]
        BEGIN_FIELD_NUMBER: _ClassVar[int]
        END_FIELD_NUMBER: _ClassVar[int]
        file_index: int
        name: str
        dtype: str
        shape: _containers.RepeatedScalarFieldContainer[int]
        begin: int
        end: int
        def __init__(self, file_index: _Optional[int] = ..., name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., begin: _Optional[int] = ..., end: _Optional[int] = ...) -> None: ...
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    tensors: _containers.RepeatedCompositeFieldContainer[Selected.Tensor]
    files: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, tensors: _Optional[_Iterable[_Union[Selected.Tensor, _Mapping[str, _Any]]]] = ..., files: _Optional[_Iterable[int]] = ...) -> None: ...

class ModelFile(_message.Message):
    __slots__ = ("index", "path", "size_bytes", "sha256")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    index: int
    path: str
    size_bytes: int
    sha256: str
    def __init__(self, index: _Optional[int] = ..., path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class RangesReady(_message.Message):
    __slots__ = ("ranges",)
    class Range(_message.Message):
        __slots__ = ("file_index", "offset_bytes", "length_bytes")
        FILE_INDEX_FIELD_NUMBER: _ClassVar[int]
        OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
        LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
        file_index: int
        offset_bytes: int
        length_bytes: int
        def __init__(self, file_index: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., length_bytes: _Optional[int] = ...) -> None: ...
    RANGES_FIELD_NUMBER: _ClassVar[int]
    ranges: _containers.RepeatedCompositeFieldContainer[RangesReady.Range]
    def __init__(self, ranges: _Optional[_Iterable[_Union[RangesReady.Range, _Mapping[str, _Any]]]] = ...) -> None: ...

class Complete(_message.Message):
    __slots__ = ("from_level", "origin_bytes", "disk_bytes", "reused_bytes", "load_s", "checked_by", "partial")
    FROM_LEVEL_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    REUSED_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BY_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    from_level: Level
    origin_bytes: int
    disk_bytes: int
    reused_bytes: int
    load_s: float
    checked_by: str
    partial: bool
    def __init__(self, from_level: _Optional[_Union[Level, str]] = ..., origin_bytes: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., reused_bytes: _Optional[int] = ..., load_s: _Optional[float] = ..., checked_by: _Optional[str] = ..., partial: bool = ...) -> None: ...

class Damaged(_message.Message):
    __slots__ = ("file_index", "offset_bytes", "length_bytes")
    FILE_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    file_index: int
    offset_bytes: int
    length_bytes: int
    def __init__(self, file_index: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., length_bytes: _Optional[int] = ...) -> None: ...

class KeepAlive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DetachRequest(_message.Message):
    __slots__ = ("lease_id", "token")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    token: str
    def __init__(self, lease_id: _Optional[str] = ..., token: _Optional[str] = ...) -> None: ...

class DetachResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelSummary]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelSummary, _Mapping[str, _Any]]]] = ...) -> None: ...

class ModelSummary(_message.Message):
    __slots__ = ("name", "revision", "state", "tier", "tier_from", "pinned", "size_bytes", "l1_bytes", "l2_bytes", "file_count", "lease_count", "source", "last_used_time_s", "checked_by", "progress", "priority", "worth_s", "transient", "tenant", "base")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    TIER_FROM_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    L1_BYTES_FIELD_NUMBER: _ClassVar[int]
    L2_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BY_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WORTH_S_FIELD_NUMBER: _ClassVar[int]
    TRANSIENT_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
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
    checked_by: str
    progress: float
    priority: int
    worth_s: float
    transient: bool
    tenant: str
    base: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., state: _Optional[_Union[RevisionState, str]] = ..., tier: _Optional[_Union[Tier, str]] = ..., tier_from: _Optional[str] = ..., pinned: bool = ..., size_bytes: _Optional[int] = ..., l1_bytes: _Optional[int] = ..., l2_bytes: _Optional[int] = ..., file_count: _Optional[int] = ..., lease_count: _Optional[int] = ..., source: _Optional[str] = ..., last_used_time_s: _Optional[float] = ..., checked_by: _Optional[str] = ..., progress: _Optional[float] = ..., priority: _Optional[int] = ..., worth_s: _Optional[float] = ..., transient: bool = ..., tenant: _Optional[str] = ..., base: _Optional[str] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("summary", "files", "revisions", "path", "leases", "notes", "last_error", "places", "schedule", "schedule_change_time_s", "pull_times_s")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    REVISIONS_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    LAST_ERROR_FIELD_NUMBER: _ClassVar[int]
    PLACES_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    SCHEDULE_CHANGE_TIME_S_FIELD_NUMBER: _ClassVar[int]
    PULL_TIMES_S_FIELD_NUMBER: _ClassVar[int]
    summary: ModelSummary
    files: _containers.RepeatedCompositeFieldContainer[FileDetail]
    revisions: _containers.RepeatedScalarFieldContainer[str]
    path: str
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    notes: _containers.RepeatedScalarFieldContainer[str]
    last_error: str
    places: _containers.RepeatedCompositeFieldContainer[Place]
    schedule: _containers.RepeatedScalarFieldContainer[str]
    schedule_change_time_s: float
    pull_times_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, summary: _Optional[_Union[ModelSummary, _Mapping[str, _Any]]] = ..., files: _Optional[_Iterable[_Union[FileDetail, _Mapping[str, _Any]]]] = ..., revisions: _Optional[_Iterable[str]] = ..., path: _Optional[str] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping[str, _Any]]]] = ..., notes: _Optional[_Iterable[str]] = ..., last_error: _Optional[str] = ..., places: _Optional[_Iterable[_Union[Place, _Mapping[str, _Any]]]] = ..., schedule: _Optional[_Iterable[str]] = ..., schedule_change_time_s: _Optional[float] = ..., pull_times_s: _Optional[_Iterable[float]] = ...) -> None: ...

class Place(_message.Message):
    __slots__ = ("level", "held_bytes", "worth_s", "requests", "reload_s", "why", "evicted_before", "evicted_before_count", "verified_time_s")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    HELD_BYTES_FIELD_NUMBER: _ClassVar[int]
    WORTH_S_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    RELOAD_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BEFORE_FIELD_NUMBER: _ClassVar[int]
    EVICTED_BEFORE_COUNT_FIELD_NUMBER: _ClassVar[int]
    VERIFIED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    level: Level
    held_bytes: int
    worth_s: float
    requests: float
    reload_s: float
    why: str
    evicted_before: _containers.RepeatedScalarFieldContainer[str]
    evicted_before_count: int
    verified_time_s: float
    def __init__(self, level: _Optional[_Union[Level, str]] = ..., held_bytes: _Optional[int] = ..., worth_s: _Optional[float] = ..., requests: _Optional[float] = ..., reload_s: _Optional[float] = ..., why: _Optional[str] = ..., evicted_before: _Optional[_Iterable[str]] = ..., evicted_before_count: _Optional[int] = ..., verified_time_s: _Optional[float] = ...) -> None: ...

class FileDetail(_message.Message):
    __slots__ = ("path", "size_bytes", "sha256", "in_l1", "in_l2", "shared_with", "chunk_count", "checked_by")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    IN_L1_FIELD_NUMBER: _ClassVar[int]
    IN_L2_FIELD_NUMBER: _ClassVar[int]
    SHARED_WITH_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHECKED_BY_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    sha256: str
    in_l1: bool
    in_l2: bool
    shared_with: _containers.RepeatedScalarFieldContainer[str]
    chunk_count: int
    checked_by: str
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., in_l1: bool = ..., in_l2: bool = ..., shared_with: _Optional[_Iterable[str]] = ..., chunk_count: _Optional[int] = ..., checked_by: _Optional[str] = ...) -> None: ...

class Lease(_message.Message):
    __slots__ = ("lease_id", "name", "revision", "client_name", "client_pid", "peer_pid", "peer_uid", "since_time_s", "complete", "size_bytes", "process", "container")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    CLIENT_PID_FIELD_NUMBER: _ClassVar[int]
    PEER_PID_FIELD_NUMBER: _ClassVar[int]
    PEER_UID_FIELD_NUMBER: _ClassVar[int]
    SINCE_TIME_S_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    name: str
    revision: str
    client_name: str
    client_pid: int
    peer_pid: int
    peer_uid: int
    since_time_s: float
    complete: bool
    size_bytes: int
    process: str
    container: str
    def __init__(self, lease_id: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., client_name: _Optional[str] = ..., client_pid: _Optional[int] = ..., peer_pid: _Optional[int] = ..., peer_uid: _Optional[int] = ..., since_time_s: _Optional[float] = ..., complete: bool = ..., size_bytes: _Optional[int] = ..., process: _Optional[str] = ..., container: _Optional[str] = ...) -> None: ...

class ListLeasesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListLeasesResponse(_message.Message):
    __slots__ = ("leases",)
    LEASES_FIELD_NUMBER: _ClassVar[int]
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    def __init__(self, leases: _Optional[_Iterable[_Union[Lease, _Mapping[str, _Any]]]] = ...) -> None: ...

class SetTierRequest(_message.Message):
    __slots__ = ("ref", "tier", "what_if")
    REF_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    WHAT_IF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    tier: Tier
    what_if: bool
    def __init__(self, ref: _Optional[str] = ..., tier: _Optional[_Union[Tier, str]] = ..., what_if: bool = ...) -> None: ...

class SetTierResponse(_message.Message):
    __slots__ = ("summary", "evictions", "loaded_bytes")
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    LOADED_BYTES_FIELD_NUMBER: _ClassVar[int]
    summary: ModelSummary
    evictions: _containers.RepeatedCompositeFieldContainer[Eviction]
    loaded_bytes: int
    def __init__(self, summary: _Optional[_Union[ModelSummary, _Mapping[str, _Any]]] = ..., evictions: _Optional[_Iterable[_Union[Eviction, _Mapping[str, _Any]]]] = ..., loaded_bytes: _Optional[int] = ...) -> None: ...

class Eviction(_message.Message):
    __slots__ = ("level", "name", "revision", "frees_bytes", "reason", "why")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FREES_BYTES_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    level: Level
    name: str
    revision: str
    frees_bytes: int
    reason: str
    why: str
    def __init__(self, level: _Optional[_Union[Level, str]] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., frees_bytes: _Optional[int] = ..., reason: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("summary",)
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    summary: ModelSummary
    def __init__(self, summary: _Optional[_Union[ModelSummary, _Mapping[str, _Any]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("summary",)
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    summary: ModelSummary
    def __init__(self, summary: _Optional[_Union[ModelSummary, _Mapping[str, _Any]]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("ref", "level")
    REF_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    ref: str
    level: Level
    def __init__(self, ref: _Optional[str] = ..., level: _Optional[_Union[Level, str]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("l1_freed_bytes", "l2_freed_bytes")
    L1_FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    L2_FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    l1_freed_bytes: int
    l2_freed_bytes: int
    def __init__(self, l1_freed_bytes: _Optional[int] = ..., l2_freed_bytes: _Optional[int] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("ref",)
    REF_FIELD_NUMBER: _ClassVar[int]
    ref: str
    def __init__(self, ref: _Optional[str] = ...) -> None: ...

class RemoveResponse(_message.Message):
    __slots__ = ("l1_freed_bytes", "l2_freed_bytes")
    L1_FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    L2_FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    l1_freed_bytes: int
    l2_freed_bytes: int
    def __init__(self, l1_freed_bytes: _Optional[int] = ..., l2_freed_bytes: _Optional[int] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("ref", "repair")
    REF_FIELD_NUMBER: _ClassVar[int]
    REPAIR_FIELD_NUMBER: _ClassVar[int]
    ref: str
    repair: bool
    def __init__(self, ref: _Optional[str] = ..., repair: bool = ...) -> None: ...

class VerifyResponse(_message.Message):
    __slots__ = ("total_bytes", "done_bytes", "damage", "finished", "damaged_chunks", "repaired_chunks")
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    total_bytes: int
    done_bytes: int
    damage: Damage
    finished: bool
    damaged_chunks: int
    repaired_chunks: int
    def __init__(self, total_bytes: _Optional[int] = ..., done_bytes: _Optional[int] = ..., damage: _Optional[_Union[Damage, _Mapping[str, _Any]]] = ..., finished: bool = ..., damaged_chunks: _Optional[int] = ..., repaired_chunks: _Optional[int] = ...) -> None: ...

class Damage(_message.Message):
    __slots__ = ("name", "revision", "path", "sha256", "level", "chunk_index", "offset_bytes", "length_bytes", "repaired", "error")
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    LENGTH_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPAIRED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    path: str
    sha256: str
    level: Level
    chunk_index: int
    offset_bytes: int
    length_bytes: int
    repaired: bool
    error: str
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., path: _Optional[str] = ..., sha256: _Optional[str] = ..., level: _Optional[_Union[Level, str]] = ..., chunk_index: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., length_bytes: _Optional[int] = ..., repaired: bool = ..., error: _Optional[str] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("levels", "counters", "lease_count", "model_count", "active_load_count", "mover_count", "uptime_s", "version", "degraded", "instance", "scrub")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LEASE_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODEL_COUNT_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_LOAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    MOVER_COUNT_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    SCRUB_FIELD_NUMBER: _ClassVar[int]
    levels: _containers.RepeatedCompositeFieldContainer[LevelStats]
    counters: _containers.ScalarMap[str, float]
    lease_count: int
    model_count: int
    active_load_count: int
    mover_count: int
    uptime_s: float
    version: str
    degraded: _containers.RepeatedScalarFieldContainer[str]
    instance: str
    scrub: Scrub
    def __init__(self, levels: _Optional[_Iterable[_Union[LevelStats, _Mapping[str, _Any]]]] = ..., counters: _Optional[_Mapping[str, float]] = ..., lease_count: _Optional[int] = ..., model_count: _Optional[int] = ..., active_load_count: _Optional[int] = ..., mover_count: _Optional[int] = ..., uptime_s: _Optional[float] = ..., version: _Optional[str] = ..., degraded: _Optional[_Iterable[str]] = ..., instance: _Optional[str] = ..., scrub: _Optional[_Union[Scrub, _Mapping[str, _Any]]] = ...) -> None: ...

class Scrub(_message.Message):
    __slots__ = ("bytes_per_s", "total_bytes", "done_bytes", "waiting")
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: int
    total_bytes: int
    done_bytes: int
    waiting: bool
    def __init__(self, bytes_per_s: _Optional[int] = ..., total_bytes: _Optional[int] = ..., done_bytes: _Optional[int] = ..., waiting: bool = ...) -> None: ...

class LevelStats(_message.Message):
    __slots__ = ("level", "capacity_bytes", "used_bytes", "reserved_bytes", "withdrawn_bytes", "pool_bytes", "blob_count", "limited_by", "transient_bytes", "hot_bytes", "hot_capacity_bytes", "longest_unverified_s")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_BYTES_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOB_COUNT_FIELD_NUMBER: _ClassVar[int]
    LIMITED_BY_FIELD_NUMBER: _ClassVar[int]
    TRANSIENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOT_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOT_CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    LONGEST_UNVERIFIED_S_FIELD_NUMBER: _ClassVar[int]
    level: Level
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    withdrawn_bytes: int
    pool_bytes: int
    blob_count: int
    limited_by: str
    transient_bytes: int
    hot_bytes: int
    hot_capacity_bytes: int
    longest_unverified_s: float
    def __init__(self, level: _Optional[_Union[Level, str]] = ..., capacity_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., withdrawn_bytes: _Optional[int] = ..., pool_bytes: _Optional[int] = ..., blob_count: _Optional[int] = ..., limited_by: _Optional[str] = ..., transient_bytes: _Optional[int] = ..., hot_bytes: _Optional[int] = ..., hot_capacity_bytes: _Optional[int] = ..., longest_unverified_s: _Optional[float] = ...) -> None: ...

class OverviewRequest(_message.Message):
    __slots__ = ("models", "leases", "events", "moves", "cold_starts")
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    COLD_STARTS_FIELD_NUMBER: _ClassVar[int]
    models: int
    leases: int
    events: int
    moves: int
    cold_starts: int
    def __init__(self, models: _Optional[int] = ..., leases: _Optional[int] = ..., events: _Optional[int] = ..., moves: _Optional[int] = ..., cold_starts: _Optional[int] = ...) -> None: ...

class OverviewResponse(_message.Message):
    __slots__ = ("time_s", "stats", "uses", "models", "model_count", "moves", "move_count", "leases", "events", "cold_starts", "problems")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MODEL_COUNT_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    MOVE_COUNT_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    COLD_STARTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEMS_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    stats: StatsResponse
    uses: _containers.RepeatedCompositeFieldContainer[LevelUse]
    models: _containers.RepeatedCompositeFieldContainer[ModelSummary]
    model_count: int
    moves: _containers.RepeatedCompositeFieldContainer[Move]
    move_count: int
    leases: _containers.RepeatedCompositeFieldContainer[Lease]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    cold_starts: _containers.RepeatedCompositeFieldContainer[ColdStart]
    problems: _containers.RepeatedCompositeFieldContainer[Problem]
    def __init__(self, time_s: _Optional[float] = ..., stats: _Optional[_Union[StatsResponse, _Mapping[str, _Any]]] = ..., uses: _Optional[_Iterable[_Union[LevelUse, _Mapping[str, _Any]]]] = ..., models: _Optional[_Iterable[_Union[ModelSummary, _Mapping[str, _Any]]]] = ..., model_count: _Optional[int] = ..., moves: _Optional[_Iterable[_Union[Move, _Mapping[str, _Any]]]] = ..., move_count: _Optional[int] = ..., leases: _Optional[_Iterable[_Union[Lease, _Mapping[str, _Any]]]] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping[str, _Any]]]] = ..., cold_starts: _Optional[_Iterable[_Union[ColdStart, _Mapping[str, _Any]]]] = ..., problems: _Optional[_Iterable[_Union[Problem, _Mapping[str, _Any]]]] = ...) -> None: ...

class LevelUse(_message.Message):
    __slots__ = ("level", "holdings_bytes", "leased_bytes")
    class HoldingsBytesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    HOLDINGS_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASED_BYTES_FIELD_NUMBER: _ClassVar[int]
    level: Level
    holdings_bytes: _containers.ScalarMap[str, int]
    leased_bytes: int
    def __init__(self, level: _Optional[_Union[Level, str]] = ..., holdings_bytes: _Optional[_Mapping[str, int]] = ..., leased_bytes: _Optional[int] = ...) -> None: ...

class Move(_message.Message):
    __slots__ = ("kind", "phase", "name", "revision", "level", "source", "total_bytes", "done_bytes", "behind_total_bytes", "behind_bytes", "speed_bytes_per_s", "elapsed_s", "waiting", "waiting_count", "partial")
    KIND_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    DONE_BYTES_FIELD_NUMBER: _ClassVar[int]
    BEHIND_TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    BEHIND_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPEED_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_COUNT_FIELD_NUMBER: _ClassVar[int]
    PARTIAL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    phase: str
    name: str
    revision: str
    level: Level
    source: str
    total_bytes: int
    done_bytes: int
    behind_total_bytes: int
    behind_bytes: int
    speed_bytes_per_s: float
    elapsed_s: float
    waiting: _containers.RepeatedScalarFieldContainer[str]
    waiting_count: int
    partial: bool
    def __init__(self, kind: _Optional[str] = ..., phase: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., level: _Optional[_Union[Level, str]] = ..., source: _Optional[str] = ..., total_bytes: _Optional[int] = ..., done_bytes: _Optional[int] = ..., behind_total_bytes: _Optional[int] = ..., behind_bytes: _Optional[int] = ..., speed_bytes_per_s: _Optional[float] = ..., elapsed_s: _Optional[float] = ..., waiting: _Optional[_Iterable[str]] = ..., waiting_count: _Optional[int] = ..., partial: bool = ...) -> None: ...

class Problem(_message.Message):
    __slots__ = ("about", "message", "name")
    ABOUT_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    about: str
    message: str
    name: str
    def __init__(self, about: _Optional[str] = ..., message: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class TraceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TraceResponse(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[TraceRow]
    def __init__(self, rows: _Optional[_Iterable[_Union[TraceRow, _Mapping[str, _Any]]]] = ...) -> None: ...

class TraceRow(_message.Message):
    __slots__ = ("time_s", "model", "size_bytes", "lease_s")
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    model: str
    size_bytes: int
    lease_s: float
    def __init__(self, time_s: _Optional[float] = ..., model: _Optional[str] = ..., size_bytes: _Optional[int] = ..., lease_s: _Optional[float] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("replay",)
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    replay: bool
    def __init__(self, replay: bool = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: Event
    def __init__(self, event: _Optional[_Union[Event, _Mapping[str, _Any]]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time_s", "kind", "name", "revision", "message", "fields")
    class FieldsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    FIELDS_FIELD_NUMBER: _ClassVar[int]
    time_s: float
    kind: str
    name: str
    revision: str
    message: str
    fields: _containers.ScalarMap[str, str]
    def __init__(self, time_s: _Optional[float] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., revision: _Optional[str] = ..., message: _Optional[str] = ..., fields: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Artifact(_message.Message):
    __slots__ = ("name", "key", "archive_path", "sha256", "size_bytes", "generation", "saved_time_s", "last_used_time_s", "levels", "source", "upload_error")
    class KeyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ARCHIVE_PATH_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SAVED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    LAST_USED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ERROR_FIELD_NUMBER: _ClassVar[int]
    name: str
    key: _containers.ScalarMap[str, str]
    archive_path: str
    sha256: str
    size_bytes: int
    generation: int
    saved_time_s: float
    last_used_time_s: float
    levels: _containers.RepeatedScalarFieldContainer[Level]
    source: str
    upload_error: str
    def __init__(self, name: _Optional[str] = ..., key: _Optional[_Mapping[str, str]] = ..., archive_path: _Optional[str] = ..., sha256: _Optional[str] = ..., size_bytes: _Optional[int] = ..., generation: _Optional[int] = ..., saved_time_s: _Optional[float] = ..., last_used_time_s: _Optional[float] = ..., levels: _Optional[_Iterable[_Union[Level, str]]] = ..., source: _Optional[str] = ..., upload_error: _Optional[str] = ...) -> None: ...

class FindArtifactRequest(_message.Message):
    __slots__ = ("key", "local_only")
    class KeyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    KEY_FIELD_NUMBER: _ClassVar[int]
    LOCAL_ONLY_FIELD_NUMBER: _ClassVar[int]
    key: _containers.ScalarMap[str, str]
    local_only: bool
    def __init__(self, key: _Optional[_Mapping[str, str]] = ..., local_only: bool = ...) -> None: ...

class FindArtifactResponse(_message.Message):
    __slots__ = ("name", "artifact", "nearest", "descriptor_socket", "destination")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    NEAREST_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTOR_SOCKET_FIELD_NUMBER: _ClassVar[int]
    DESTINATION_FIELD_NUMBER: _ClassVar[int]
    name: str
    artifact: Artifact
    nearest: _containers.RepeatedCompositeFieldContainer[Artifact]
    descriptor_socket: str
    destination: str
    def __init__(self, name: _Optional[str] = ..., artifact: _Optional[_Union[Artifact, _Mapping[str, _Any]]] = ..., nearest: _Optional[_Iterable[_Union[Artifact, _Mapping[str, _Any]]]] = ..., descriptor_socket: _Optional[str] = ..., destination: _Optional[str] = ...) -> None: ...

class PutArtifactRequest(_message.Message):
    __slots__ = ("offer", "data")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    offer: ArtifactOffer
    data: bytes
    def __init__(self, offer: _Optional[_Union[ArtifactOffer, _Mapping[str, _Any]]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ArtifactOffer(_message.Message):
    __slots__ = ("ticket", "key", "size_bytes", "sha256", "replaces_sha256")
    class KeyEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    TICKET_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    REPLACES_SHA256_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    key: _containers.ScalarMap[str, str]
    size_bytes: int
    sha256: str
    replaces_sha256: str
    def __init__(self, ticket: _Optional[str] = ..., key: _Optional[_Mapping[str, str]] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ..., replaces_sha256: _Optional[str] = ...) -> None: ...

class PutArtifactResponse(_message.Message):
    __slots__ = ("outcome", "artifact")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[PutArtifactResponse.Outcome]
        OUTCOME_STORED: _ClassVar[PutArtifactResponse.Outcome]
        OUTCOME_SAME: _ClassVar[PutArtifactResponse.Outcome]
        OUTCOME_OTHER: _ClassVar[PutArtifactResponse.Outcome]
        OUTCOME_BUSY: _ClassVar[PutArtifactResponse.Outcome]
    OUTCOME_UNSPECIFIED: PutArtifactResponse.Outcome
    OUTCOME_STORED: PutArtifactResponse.Outcome
    OUTCOME_SAME: PutArtifactResponse.Outcome
    OUTCOME_OTHER: PutArtifactResponse.Outcome
    OUTCOME_BUSY: PutArtifactResponse.Outcome
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ARTIFACT_FIELD_NUMBER: _ClassVar[int]
    outcome: PutArtifactResponse.Outcome
    artifact: Artifact
    def __init__(self, outcome: _Optional[_Union[PutArtifactResponse.Outcome, str]] = ..., artifact: _Optional[_Union[Artifact, _Mapping[str, _Any]]] = ...) -> None: ...

class ListArtifactsRequest(_message.Message):
    __slots__ = ("remote",)
    REMOTE_FIELD_NUMBER: _ClassVar[int]
    remote: bool
    def __init__(self, remote: bool = ...) -> None: ...

class ListArtifactsResponse(_message.Message):
    __slots__ = ("artifacts",)
    ARTIFACTS_FIELD_NUMBER: _ClassVar[int]
    artifacts: _containers.RepeatedCompositeFieldContainer[Artifact]
    def __init__(self, artifacts: _Optional[_Iterable[_Union[Artifact, _Mapping[str, _Any]]]] = ...) -> None: ...

class ReportColdStartRequest(_message.Message):
    __slots__ = ("cold_start",)
    COLD_START_FIELD_NUMBER: _ClassVar[int]
    cold_start: ColdStart
    def __init__(self, cold_start: _Optional[_Union[ColdStart, _Mapping[str, _Any]]] = ...) -> None: ...

class ReportColdStartResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListColdStartsRequest(_message.Message):
    __slots__ = ("ref", "limit")
    REF_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    ref: str
    limit: int
    def __init__(self, ref: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class ListColdStartsResponse(_message.Message):
    __slots__ = ("cold_starts",)
    COLD_STARTS_FIELD_NUMBER: _ClassVar[int]
    cold_starts: _containers.RepeatedCompositeFieldContainer[ColdStart]
    def __init__(self, cold_starts: _Optional[_Iterable[_Union[ColdStart, _Mapping[str, _Any]]]] = ...) -> None: ...

class ColdStart(_message.Message):
    __slots__ = ("name", "revision", "client_name", "started_time_s", "total_s", "phases", "labels", "reported_time_s")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    CLIENT_NAME_FIELD_NUMBER: _ClassVar[int]
    STARTED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    REPORTED_TIME_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    revision: str
    client_name: str
    started_time_s: float
    total_s: float
    phases: _containers.RepeatedCompositeFieldContainer[ColdStartPhase]
    labels: _containers.ScalarMap[str, str]
    reported_time_s: float
    def __init__(self, name: _Optional[str] = ..., revision: _Optional[str] = ..., client_name: _Optional[str] = ..., started_time_s: _Optional[float] = ..., total_s: _Optional[float] = ..., phases: _Optional[_Iterable[_Union[ColdStartPhase, _Mapping[str, _Any]]]] = ..., labels: _Optional[_Mapping[str, str]] = ..., reported_time_s: _Optional[float] = ...) -> None: ...

class ColdStartPhase(_message.Message):
    __slots__ = ("name", "start_s", "end_s", "parent", "after", "running", "failed")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_s: float
    end_s: float
    parent: int
    after: str
    running: bool
    failed: bool
    def __init__(self, name: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ..., parent: _Optional[int] = ..., after: _Optional[str] = ..., running: bool = ..., failed: bool = ...) -> None: ...
