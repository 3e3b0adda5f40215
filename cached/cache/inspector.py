"""Looks at chunks where they are, mends damaged ones, quarantines what cannot be mended, and tells who holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import structlog

from cached.cache.pulls import Pulls
from cached.cache.registry import Blob
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, LevelError, MoverError, NoRoomError, NotFoundError
from cached.level import Level
from cached.levels.base import FileRef
from cached.manifest import FileEntry, Manifest
from cached.transfer.fill import Fill, Sources
from cached.transfer.jobs import Checksum, Moved
from cached.types import Damage
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_log = structlog.get_logger(__name__)

_LOOKS = 3


@dataclass(frozen=True, slots=True)
class Place:
    """One chunk of one blob at one level, and the first file that it was met as."""

    manifest: Manifest
    entry: FileEntry
    blob: Blob
    level: Level
    index: int

    @property
    def offset_bytes(self) -> int:
        """Where the chunk begins."""
        return self.index * CHUNK_BYTES

    @property
    def length_bytes(self) -> int:
        """How long the chunk is."""
        return chunk_length(self.blob.record.size_bytes, self.index)


def places_of(manifest: Manifest, entry: FileEntry, blob: Blob, level: Level) -> Iterator[Place]:
    """Every chunk of a blob at a level."""
    for index in range(chunk_count(blob.record.size_bytes)):
        yield Place(manifest, entry, blob, level, index)


@dataclass(slots=True)
class _Mending:
    """What came of a damaged chunk: ``error`` is why it is still damaged, ``refused`` that its level takes no bytes."""

    error: str = ""
    refused: bool = False


class Inspector:
    """Loop only. ``on_damage`` is told of each damaged chunk of L1, so that holders hear of it."""

    def __init__(self, services: Services, pulls: Pulls) -> None:
        self._services = services
        self._pulls = pulls
        self.on_damage: Callable[[Damage], None] = lambda _damage: None

    async def look(self, place: Place, *, repair: bool, priority: int = 0, known: bool = False) -> Damage | None:
        """Reads a chunk and compares it. None when it is right, or is not there any more; else what became of it.

        ``known``: it was damaged before, which was told and counted then.
        """
        for _ in range(_LOOKS):
            if not place.blob.at(place.level):
                return None  # evicted while we were at other places
            ref = self._ref(place, place.level)
            if ref is None:
                return await self._damaged(place, None, "the blob is gone", repair, priority, known)
            why = await self._compare(place, ref, priority)
            if why and self._ref(place, place.level) != ref:
                continue  # evicted, or brought again, while we looked
            return await self._damaged(place, ref, why, repair, priority, known) if why else None
        return None

    def _ref(self, place: Place, level: Level) -> FileRef | None:
        if not place.blob.at(level):
            return None
        try:
            return self._services.storage.level(level).blob(place.blob.record.digest)
        except (NotFoundError, LevelError):
            return None

    async def _compare(self, place: Place, ref: FileRef, priority: int) -> str:
        """What is wrong with the chunk, or nothing."""
        expected = place.blob.record.crc64[place.index]
        try:
            job = Checksum(ref, place.offset_bytes, place.length_bytes)
            answer = await self._services.runner.run(job, priority=priority)
        except (NotFoundError, LevelError) as error:
            return error.message
        if not isinstance(answer, Moved):
            raise MoverError("a mover answered a checksum with something else")
        return "" if answer.crc64 == expected else f"expected crc64 {expected:016x}, found {answer.crc64:016x}"

    async def _damaged(
        self,
        place: Place,
        ref: FileRef | None,
        why: str,
        repair: bool,  # noqa: FBT001 - see look
        priority: int,
        known: bool,  # noqa: FBT001 - see look
    ) -> Damage:
        services, record = self._services, place.blob.record
        if not known:
            services.metrics.checksum_failures.labels(level=place.level.value).inc()
        mending = _Mending(why)
        if repair and ref is not None:
            mending = await self._mend(place, ref, priority)
        damage = Damage(
            name=place.manifest.name, revision=place.manifest.revision, path=place.entry.path, sha256=record.digest,
            level=place.level, chunk_index=place.index, offset_bytes=place.offset_bytes,
            length_bytes=place.length_bytes, repaired=repair and not mending.error, error=mending.error,
        )  # fmt: skip
        if damage.repaired or not known:
            self._tell(damage, why)
        if damage.repaired:
            services.metrics.repaired_chunks.labels(level=place.level.value).inc()
        elif repair and not (mending.refused and place.level is Level.L2 and services.give_up_disk_copy(record.digest)):
            services.verified.doubt(record.digest, place.level)
            services.quarantine(record.digest, f"chunk {place.index} of {place.entry.path}: {mending.error}")
        if place.level is Level.L1 and not damage.repaired:
            services.registry.doubt(record.digest)
        if place.level is Level.L1 and (damage.repaired or not known):
            self.on_damage(damage)
        return damage

    def _tell(self, damage: Damage, why: str) -> None:
        message = f"chunk {damage.chunk_index} of {damage.path} in {damage.level}: {why}"
        fields: dict[str, Any] = {
            "path": damage.path, "level": damage.level.value, "chunk": damage.chunk_index,
            "offset_bytes": damage.offset_bytes, "length_bytes": damage.length_bytes,
        }  # fmt: skip
        if damage.repaired:
            self._services.events.emit("damage.repaired", message, name=damage.name, revision=damage.revision, **fields)
            return
        self._services.failures.report(
            "damage.found", IntegrityError(message, check="crc64", **fields), name=damage.name, revision=damage.revision
        )

    async def _mend(self, place: Place, ref: FileRef, priority: int) -> _Mending:
        """Brings the chunk again, from the other level or by one ranged read of the origin."""
        services, record = self._services, place.blob.record
        fill = Fill(
            key=f"mend {record.digest}",
            runner=services.runner,
            clock=services.clock,
            target=ref,
            sources=Sources(
                disk=self._ref(place, Level.L2 if place.level is Level.L1 else Level.L1),
                origin=self._pulls.origin_of(place.manifest, place.entry),
                expected=dict(enumerate(record.crc64)),
            ),
            retry=services.retry,
            width=1,
            priority=priority,
        )
        try:
            await fill.mend(place.index)
        except IntegrityError as error:
            return _Mending(f"{error.message} ({error.fields.get('check', 'checksum')})")
        except CachedError as error:
            return _Mending(error.message, refused=isinstance(error, LevelError | NoRoomError))
        return _Mending()
