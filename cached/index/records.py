"""The values that only the index stores, and how each kind of value is keyed and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from cached.access import AccessList
from cached.errors import InvalidRequestError
from cached.level import Level
from cached.manifest import BlobRecord, Manifest, PlainReader
from cached.refs import check_name, parse_ref
from cached.types import ColdStart, ColdStartPhase, Tier

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A model, whether or not any of its bytes are here."""

    name: str
    source: str = ""
    origin_options: Mapping[str, str] = field(default_factory=dict)
    operator_tier: Tier | None = None
    pinned: bool = False
    current_revision: str = ""
    last_used_wall_s: float = 0.0
    attach_count: int = 0
    last_error: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True)
class PartFile:
    """A file of a revision that is not, or not yet, here whole. ``digest`` is empty while it is not known."""

    path: str
    size_bytes: int
    version: str
    digest: str
    ingest_id: str


@dataclass(frozen=True, slots=True)
class PartRecord:
    """A revision of which only a part was asked for: what is here of it is kept, and never brought by itself.

    ``origin_options``: those that it came with, beside the configuration's.
    """

    name: str
    revision: str
    source: str
    files: tuple[PartFile, ...]
    origin_options: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def ingests(self) -> frozenset[str]:
        """Ids of the ingests that there may be."""
        return frozenset(file.ingest_id for file in self.files)

    @property
    def total_bytes(self) -> int:
        """Of the whole revision."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class PendingPull:
    """A pull that was accepted and has not ended: taken up again after a restart."""

    name: str
    revision: str
    source: str
    level: Level
    ingests: tuple[str, ...] = ()
    """Ids of the ingests that it writes to: those that are kept for it."""
    files: tuple[PartFile, ...] = ()
    """Of the whole revision; none in what earlier versions wrote."""
    origin_options: Mapping[str, str] = field(default_factory=dict)
    """Those that it came with, beside the configuration's."""

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def part(self) -> PartRecord:
        """What there is of the revision, as of one of which only a part was asked for."""
        return PartRecord(self.name, self.revision, self.source, self.files, self.origin_options)


@dataclass(frozen=True, slots=True)
class TimedPull:
    """A pull that begins later. ``ref`` is what was asked for, whose model is ``name``; ``tier``: to be set then."""

    name: str
    ref: str
    at_time_s: float
    source: str = ""
    level: Level = Level.L1
    tier: Tier | None = None

    def __post_init__(self) -> None:
        check_name(self.name)

    @property
    def key(self) -> str:
        """One for each model and time: to ask again is to change one's mind."""
        return f"{self.name}/{self.at_time_s:.3f}"


@dataclass(frozen=True, slots=True)
class PolicyRecord:
    """Something that the policy remembers, in its own words: plain JSON."""

    name: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ColdStartsRecord:
    """The last starts of a model's workers, the oldest first."""

    name: str
    starts: tuple[ColdStart, ...]

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True, slots=True)
class VerifiedRecord:
    """When all of a blob was last found right at each level, in Unix time; 0: never."""

    digest: str
    l1_time_s: float = 0.0
    l2_time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """Who may know of a model, as the catalog said last: it counts on when the catalog is gone, or names it no more."""

    name: str
    access: AccessList

    def __post_init__(self) -> None:
        check_name(self.name)


@dataclass(frozen=True)
class Kind(Generic[T]):
    """One kind of value. ``lazy``: kept as text in memory, because it is big and seldom read."""

    prefix: str
    key_of: Callable[[T], str]
    to_dict: Callable[[T], dict[str, Any]]
    from_dict: Callable[[object], T]
    lazy: bool = False

    def text(self, value: T) -> str:
        """JSON. Raises ValueError for a number that is not finite."""
        return json.dumps(self.to_dict(value), separators=(",", ":"), allow_nan=False)

    def value(self, text: str) -> T:
        """Reads what the method ``text`` wrote. Raises IntegrityError or ValueError for anything else."""
        return self.from_dict(json.loads(text))


def _tier(reader: PlainReader) -> Tier | None:
    text = reader.text("tier")
    if text and text not in {tier.value for tier in Tier}:
        raise reader.wrong(f"{text[:40]!r} is no tier")
    return Tier(text) if text else None


def _level(reader: PlainReader) -> Level:
    text = reader.text("level")
    if text not in {level.value for level in Level}:
        raise reader.wrong(f"{text[:40]!r} is no level")
    return Level(text)


def _ref(reader: PlainReader) -> str:
    text = reader.text("ref")
    parse_ref(text)
    return text


def _model_to_dict(record: ModelRecord) -> dict[str, Any]:
    return {
        "name": record.name,
        "source": record.source,
        "origin_options": dict(record.origin_options),
        "tier": record.operator_tier.value if record.operator_tier else "",
        "pinned": record.pinned,
        "current_revision": record.current_revision,
        "last_used_wall_s": record.last_used_wall_s,
        "attach_count": record.attach_count,
        "last_error": record.last_error,
    }


def _model_from_dict(data: object) -> ModelRecord:
    reader = PlainReader("model record", data)
    try:
        record = ModelRecord(
            name=reader.text("name"),
            source=reader.text("source"),
            origin_options=reader.texts_by_name("origin_options"),
            operator_tier=_tier(reader),
            pinned=reader.boolean("pinned"),
            current_revision=reader.text("current_revision"),
            last_used_wall_s=reader.number("last_used_wall_s"),
            attach_count=reader.integer("attach_count"),
            last_error=reader.text("last_error"),
        )
    except InvalidRequestError as error:
        raise reader.wrong(error.message) from error
    reader.finish()
    return record


def _pending_to_dict(pull: PendingPull) -> dict[str, Any]:
    return {
        "name": pull.name,
        "revision": pull.revision,
        "source": pull.source,
        "level": pull.level.value,
        "ingests": list(pull.ingests),
        "files": _files_to_rows(pull.files),
        "origin_options": dict(pull.origin_options),
    }


def _pending_from_dict(data: object) -> PendingPull:
    reader = PlainReader("pending pull", _with(data, files=[], origin_options={}))
    try:
        pull = PendingPull(
            name=reader.text("name"),
            revision=reader.text("revision"),
            source=reader.text("source"),
            level=_level(reader),
            ingests=reader.texts("ingests"),
            files=tuple(map(_part_file, reader.items("files"))),
            origin_options=reader.texts_by_name("origin_options"),
        )
    except InvalidRequestError as error:
        raise reader.wrong(error.message) from error
    reader.finish()
    return pull


def _part_to_dict(part: PartRecord) -> dict[str, Any]:
    return {
        "name": part.name,
        "revision": part.revision,
        "source": part.source,
        "files": _files_to_rows(part.files),
        "origin_options": dict(part.origin_options),
    }


def _part_from_dict(data: object) -> PartRecord:
    reader = PlainReader("record of a part", _with(data, origin_options={}))
    try:
        part = PartRecord(
            name=reader.text("name"),
            revision=reader.text("revision"),
            source=reader.text("source"),
            files=tuple(map(_part_file, reader.items("files"))),
            origin_options=reader.texts_by_name("origin_options"),
        )
    except InvalidRequestError as error:
        raise reader.wrong(error.message) from error
    reader.finish()
    return part


def _with(data: object, **missing: object) -> object:
    """With what earlier versions did not write."""
    return {**missing, **data} if isinstance(data, dict) else data


def _files_to_rows(files: Iterable[PartFile]) -> list[list[str | int]]:
    return [[file.path, file.size_bytes, file.version, file.digest, file.ingest_id] for file in files]


def _part_file(row: object) -> PartFile:
    match row:
        case [str(path), int(size_bytes), str(version), str(digest), str(ingest_id)] if size_bytes >= 0:
            return PartFile(path, size_bytes, version, digest, ingest_id)
    raise ValueError("not a file of a part")


def _timed_to_dict(pull: TimedPull) -> dict[str, Any]:
    return {
        "name": pull.name,
        "ref": pull.ref,
        "at_time_s": pull.at_time_s,
        "source": pull.source,
        "level": pull.level.value,
        "tier": pull.tier.value if pull.tier else "",
    }


def _timed_from_dict(data: object) -> TimedPull:
    reader = PlainReader("timed pull", data)
    try:
        pull = TimedPull(
            name=reader.text("name"),
            ref=_ref(reader),
            at_time_s=reader.number("at_time_s"),
            source=reader.text("source"),
            level=_level(reader),
            tier=_tier(reader),
        )
    except InvalidRequestError as error:
        raise reader.wrong(error.message) from error
    reader.finish()
    return pull


def _policy_from_dict(data: object) -> PolicyRecord:
    match data:
        case {"name": str(name), "data": dict(kept), **rest} if not rest:
            return PolicyRecord(name, kept)
    raise ValueError("not a policy record")


def _cold_starts_to_dict(record: ColdStartsRecord) -> dict[str, Any]:
    return {"name": record.name, "starts": [_cold_start_to_dict(start) for start in record.starts]}


def _cold_start_to_dict(start: ColdStart) -> dict[str, Any]:
    return {
        "revision": start.revision,
        "client_name": start.client_name,
        "started_time_s": start.started_time_s,
        "reported_time_s": start.reported_time_s,
        "total_s": start.total_s,
        "labels": start.labels,
        "phases": [
            [item.name, item.start_s, item.end_s, item.parent, item.after, item.running, item.failed]
            for item in start.phases
        ],
    }


def _cold_starts_from_dict(data: object) -> ColdStartsRecord:
    reader = PlainReader("record of cold starts", data)
    name = reader.text("name")
    try:
        record = ColdStartsRecord(name, tuple(_cold_start_from_dict(name, item) for item in reader.items("starts")))
    except InvalidRequestError as error:
        raise reader.wrong(error.message) from error
    reader.finish()
    return record


def _cold_start_from_dict(name: str, data: object) -> ColdStart:
    reader = PlainReader("cold start", data)
    start = ColdStart(
        name=name,
        revision=reader.text("revision"),
        client_name=reader.text("client_name"),
        started_time_s=reader.number("started_time_s"),
        reported_time_s=reader.number("reported_time_s"),
        total_s=reader.number("total_s"),
        labels=reader.texts_by_name("labels"),
        phases=tuple(_phase_from_list(reader, item) for item in reader.items("phases")),
    )
    reader.finish()
    return start


def _phase_from_list(reader: PlainReader, data: object) -> ColdStartPhase:
    match data:
        case [
            str(name), float() | int() as start_s, float() | int() as end_s, None | int() as parent,
            str(after), bool(running), bool(failed),
        ]:  # fmt: skip
            return ColdStartPhase(name, float(start_s), float(end_s), parent, after, running, failed)
    raise reader.wrong(f"{str(data)[:40]!r} is no phase")


def _verified_to_dict(record: VerifiedRecord) -> dict[str, Any]:
    return {"digest": record.digest, "l1_time_s": record.l1_time_s, "l2_time_s": record.l2_time_s}


def _verified_from_dict(data: object) -> VerifiedRecord:
    reader = PlainReader("times of verification", data)
    record = VerifiedRecord(reader.text("digest"), reader.number("l1_time_s"), reader.number("l2_time_s"))
    reader.finish()
    return record


def _access_to_dict(record: AccessRecord) -> dict[str, Any]:
    return {"name": record.name, "uids": sorted(record.access.uids), "gids": sorted(record.access.gids)}


def _access_from_dict(data: object) -> AccessRecord:
    match data:
        case {"name": str(name), "uids": list(uids), "gids": list(gids), **rest} if not rest and all(
            type(item) is int for item in (*uids, *gids)
        ):
            return AccessRecord(name, AccessList(frozenset(uids), frozenset(gids)))
    raise ValueError("not an access record")


MODELS: Kind[ModelRecord] = Kind("model", lambda record: record.name, _model_to_dict, _model_from_dict)
MANIFESTS: Kind[Manifest] = Kind(
    "manifest", lambda manifest: f"{manifest.name}/{manifest.revision}", Manifest.to_dict, Manifest.from_dict
)
BLOBS: Kind[BlobRecord] = Kind(
    "blob", lambda record: record.digest, BlobRecord.to_dict, BlobRecord.from_dict, lazy=True
)
PENDING: Kind[PendingPull] = Kind(
    "pending", lambda pull: f"{pull.name}/{pull.revision}", _pending_to_dict, _pending_from_dict
)
PARTS: Kind[PartRecord] = Kind("part", lambda part: f"{part.name}/{part.revision}", _part_to_dict, _part_from_dict)
POLICY: Kind[PolicyRecord] = Kind(
    "policy", lambda record: record.name, lambda record: {"name": record.name, "data": record.data}, _policy_from_dict
)
TIMED: Kind[TimedPull] = Kind("timed", lambda pull: pull.key, _timed_to_dict, _timed_from_dict)
COLD_STARTS: Kind[ColdStartsRecord] = Kind(
    "coldstarts", lambda record: record.name, _cold_starts_to_dict, _cold_starts_from_dict
)
VERIFIED: Kind[VerifiedRecord] = Kind("verified", lambda record: record.digest, _verified_to_dict, _verified_from_dict)
ACCESS: Kind[AccessRecord] = Kind("access", lambda record: record.name, _access_to_dict, _access_from_dict)
KINDS: tuple[Kind[Any], ...] = (MODELS, MANIFESTS, BLOBS, PENDING, PARTS, POLICY, TIMED, COLD_STARTS, VERIFIED, ACCESS)
