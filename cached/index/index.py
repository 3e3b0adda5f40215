"""The typed index: all of it in memory, written through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import structlog

from cached.access import AccessList
from cached.errors import IntegrityError
from cached.index.records import (
    ACCESS,
    BLOBS,
    COLD_STARTS,
    KINDS,
    MANIFESTS,
    MODELS,
    PARTS,
    PENDING,
    POLICY,
    TIMED,
    VERIFIED,
    AccessRecord,
    ColdStartsRecord,
    Kind,
    ModelRecord,
    PartRecord,
    PendingPull,
    PolicyRecord,
    TimedPull,
    VerifiedRecord,
)
from cached.index.store import DamagedEntryError, Store
from cached.manifest import BlobRecord, Manifest

_log = structlog.get_logger(__name__)

T = TypeVar("T")


class Index:
    """Belongs to the loop. Reads never touch the disk; each write waits for it, unless ``write_behind`` was called.

    A write always counts in memory. When it cannot be made durable it raises LevelError (field ``path``); it stays
    listed as unwritten, and the next write or ``flush`` tries again. The caller decides whether to go on degraded.
    """

    def __init__(self, path: Path, open_store: Callable[[Path], Store] = Store) -> None:
        """Opens or makes the folder ``path``. A database that is damaged or of a newer format is set aside beside it.

        ``warnings`` then says what happened. Raises LevelError when the folder cannot be used (read-only, full, gone).
        """
        self._store = open_store(path)
        self.path = path
        self.warnings: list[str] = list(self._store.warnings)
        self._tables: dict[str, dict[str, Any]] = {kind.prefix: {} for kind in KINDS}
        self._unwritten: dict[str, str | None] = {}
        self._undo: list[tuple[str, str, Any]] | None = None
        self._on_change: Callable[[], None] | None = None
        self._read()
        self.flush()

    def put_model(self, record: ModelRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(MODELS, record)

    def models(self) -> list[ModelRecord]:
        """All models, by name."""
        return self._all(MODELS)

    def delete_model(self, name: str) -> None:
        """Forgets it; an unknown one is ignored. Raises LevelError when not durable. So do the other deletes."""
        self._delete(MODELS, name)

    def put_manifest(self, manifest: Manifest) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(MANIFESTS, manifest)

    def manifests(self) -> list[Manifest]:
        """All manifests, by name and revision."""
        return self._all(MANIFESTS)

    def delete_manifest(self, name: str, revision: str) -> None:
        """Forgets one revision."""
        self._delete(MANIFESTS, f"{name}/{revision}")

    def put_blob(self, record: BlobRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(BLOBS, record)

    def blobs(self) -> list[BlobRecord]:
        """All blobs, by digest. Decodes every checksum: for starting up, not for often."""
        return self._all(BLOBS)

    def delete_blob(self, digest: str) -> None:
        """Forgets a blob's checksums."""
        self._delete(BLOBS, digest)

    def put_pending(self, pull: PendingPull) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(PENDING, pull)

    def pending(self) -> list[PendingPull]:
        """The pulls to take up again, by name and revision."""
        return self._all(PENDING)

    def delete_pending(self, name: str, revision: str) -> None:
        """The pull ended, well or not."""
        self._delete(PENDING, f"{name}/{revision}")

    def put_part(self, part: PartRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(PARTS, part)

    def parts(self, name: str | None = None) -> list[PartRecord]:
        """The revisions of which only a part is here, all or those of one model."""
        found: list[PartRecord] = self._all(PARTS)
        return [part for part in found if name is None or part.name == name]

    def delete_part(self, name: str, revision: str) -> None:
        """It is here whole, or not at all any more."""
        self._delete(PARTS, f"{name}/{revision}")

    def put_timed(self, pull: TimedPull) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(TIMED, pull)

    def timed(self, name: str | None = None) -> list[TimedPull]:
        """The pulls that begin later, all or those of one model, the next one first."""
        found: list[TimedPull] = [pull for pull in self._all(TIMED) if name is None or pull.name == name]
        return sorted(found, key=lambda pull: pull.at_time_s)

    def delete_timed(self, pull: TimedPull) -> None:
        """It has begun, or is not wanted any more."""
        self._delete(TIMED, pull.key)

    def put_policy(self, name: str, data: Mapping[str, Any]) -> None:
        """Adds or replaces what the policy remembers under a name. Raises LevelError when not durable."""
        self._put(POLICY, PolicyRecord(name, data))

    def policy(self, name: str) -> Mapping[str, Any] | None:
        """What the policy remembers under a name."""
        record: PolicyRecord | None = self._tables[POLICY.prefix].get(name)
        return record.data if record is not None else None

    def put_cold_starts(self, record: ColdStartsRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(COLD_STARTS, record)

    def cold_starts(self) -> list[ColdStartsRecord]:
        """The last starts of each model's workers, by name."""
        return self._all(COLD_STARTS)

    def delete_cold_starts(self, name: str) -> None:
        """Forgets those of a model."""
        self._delete(COLD_STARTS, name)

    def put_verified(self, record: VerifiedRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(VERIFIED, record)

    def verified(self, digest: str) -> VerifiedRecord | None:
        """When a blob was last found right."""
        record: VerifiedRecord | None = self._tables[VERIFIED.prefix].get(digest)
        return record

    def delete_verified(self, digest: str) -> None:
        """The blob is not known any more."""
        self._delete(VERIFIED, digest)

    def put_access(self, record: AccessRecord) -> None:
        """Adds or replaces. Raises LevelError when not durable."""
        self._put(ACCESS, record)

    def access(self) -> dict[str, AccessList]:
        """Who may know of which model, of those that have a list."""
        found: list[AccessRecord] = self._all(ACCESS)
        return {record.name: record.access for record in found}

    def delete_access(self, name: str) -> None:
        """The model has no list any more."""
        self._delete(ACCESS, name)

    @contextmanager
    def transact(self) -> Iterator[None]:
        """Several writes as one, in memory and on disk; an exception inside undoes them all. May be nested.

        No ``await`` inside: another task's writes would join. Raises LevelError at the end as a single write does.
        """
        if self._undo is not None:
            yield
            return
        self._undo, unwritten = [], dict(self._unwritten)
        try:
            yield
        except BaseException:
            for prefix, key, old in reversed(self._undo):
                self._set(prefix, key, old)
            self._unwritten = unwritten
            raise
        finally:
            self._undo = None
        self._make_durable()

    def flush(self) -> None:
        """Makes everything unwritten durable in one transaction. Raises LevelError, and then nothing of it was."""
        if self._unwritten and self._undo is None:
            self._store.write(self._unwritten)
            self._unwritten.clear()

    def write_behind(self, on_change: Callable[[], None] | None) -> None:
        """From now on writes only call this; it sees to it that ``unwritten`` is written. None: writes wait again."""
        self._on_change = on_change
        self._store.close()  # this thread's connection; it is opened again when it is needed

    @property
    def unwritten(self) -> dict[str, str | None]:
        """What is not durable yet, for ``write``."""
        return dict(self._unwritten)

    def write(self, unwritten: Mapping[str, str | None]) -> None:
        """Makes this durable in one transaction. From any thread, one at a time. Raises LevelError: none of it is."""
        if unwritten:
            self._store.write(unwritten)

    def written(self, unwritten: Mapping[str, str | None]) -> None:
        """It is durable now; what has changed again meanwhile is still to be written."""
        for key, text in unwritten.items():
            if key in self._unwritten and self._unwritten[key] == text:
                del self._unwritten[key]

    def close(self) -> None:
        """Ends the calling thread's connection; idempotent. What was not written is lost. Only reads may follow."""
        self._store.close()

    def _put(self, kind: Kind[T], value: T) -> None:
        text = kind.text(value)
        self._change(kind.prefix, kind.key_of(value), text if kind.lazy else value, text)

    def _delete(self, kind: Kind[T], key: str) -> None:
        if key in self._tables[kind.prefix]:
            self._change(kind.prefix, key, None, None)

    def _all(self, kind: Kind[T]) -> list[T]:
        values: list[Any] = [value for _, value in sorted(self._tables[kind.prefix].items())]
        return [kind.value(value) for value in values] if kind.lazy else values

    def _change(self, prefix: str, key: str, value: object, text: str | None) -> None:
        if self._undo is not None:
            self._undo.append((prefix, key, self._tables[prefix].get(key)))
        self._set(prefix, key, value)
        self._unwritten[f"{prefix}/{key}"] = text
        self._make_durable()

    def _make_durable(self) -> None:
        if self._on_change is None:
            self.flush()
        elif self._undo is None:
            self._on_change()

    def _set(self, prefix: str, key: str, value: object) -> None:
        if value is None:
            self._tables[prefix].pop(key, None)
        else:
            self._tables[prefix][key] = value

    def _read(self) -> None:
        kinds = {kind.prefix: kind for kind in KINDS}
        for key in self._store.damaged:
            self._forget(key, "its checksum is wrong")
        for full_key, text in self._store.take_entries().items():
            prefix, _, key = full_key.partition("/")
            kind = kinds.get(prefix)
            if kind is None:
                self._forget(full_key, "it is of no known kind")
                continue
            try:
                value = kind.value(text)
                if kind.key_of(value) != key:
                    raise DamagedEntryError("it is another entry's")
            except (ValueError, IntegrityError) as error:
                self._forget(full_key, str(error))
                continue
            self._tables[prefix][key] = text if kind.lazy else value

    def _forget(self, full_key: str, cause: str) -> None:
        self.warnings.append(f"the index entry {full_key} was damaged and is forgotten: {cause}")
        _log.warning("index.entry_forgotten", path=str(self.path), entry=full_key, cause=cause)
        self._unwritten[full_key] = None
