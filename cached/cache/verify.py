"""Reads every byte again and compares it with its chunk checksums; on request, mends what is damaged."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

from cached.cache.pulls import Pulls
from cached.cache.registry import Blob
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, LevelError, MoverError, NotFoundError
from cached.levels.base import FileRef
from cached.manifest import FileEntry, Manifest
from cached.transfer.fill import Fill, Sources
from cached.transfer.jobs import Checksum, Moved
from cached.types import Damage, Level, VerifyProgress
from cached.units import CHUNK_BYTES, chunk_count, chunk_length

_LOOKS = 3


@dataclass(frozen=True, slots=True)
class _Place:
    """One chunk of one blob at one level, and the first file that it was met as."""

    manifest: Manifest
    entry: FileEntry
    blob: Blob
    level: Level
    index: int

    @property
    def offset_bytes(self) -> int:
        return self.index * CHUNK_BYTES

    @property
    def length_bytes(self) -> int:
        return chunk_length(self.blob.record.size_bytes, self.index)


class Verifier:
    """``on_damage`` is told of each damaged chunk of L1, so that holders hear of it."""

    def __init__(self, services: Services, pulls: Pulls) -> None:
        self._services = services
        self._pulls = pulls
        self.on_damage: Callable[[Manifest, FileEntry, Damage], None] = lambda *_what: None

    async def verify(self, manifests: list[Manifest], *, repair: bool) -> AsyncIterator[VerifyProgress]:
        """Progress, each damage as it is found, and a last message with ``finished``."""
        places = list(self._places(manifests))
        total = sum(place.length_bytes for place in places)
        done = damaged = repaired = 0
        for start in range(0, len(places), self._services.width):
            batch = places[start : start + self._services.width]
            found = await asyncio.gather(*(self._look(place, repair=repair) for place in batch))
            for place, damage in zip(batch, found, strict=True):
                done += place.length_bytes
                if damage is not None:
                    damaged += 1
                    repaired += damage.repaired
                    yield VerifyProgress(total, done, damage, False, damaged, repaired)
            yield VerifyProgress(total, done, None, False, damaged, repaired)
        self._settle(manifests, damaged, repaired)
        yield VerifyProgress(total, done, None, True, damaged, repaired)

    def _settle(self, manifests: list[Manifest], damaged: int, repaired: int) -> None:
        """What has no damage left is out of quarantine."""
        if damaged == repaired:
            for manifest in manifests:
                for entry in manifest.files:
                    self._services.registry.mended(entry.digest)

    def _places(self, manifests: list[Manifest]) -> Iterator[_Place]:
        seen: set[tuple[str, Level]] = set()
        for manifest in manifests:
            for entry in manifest.files:
                blob = self._services.registry.blobs[entry.digest]
                for level in (Level.L1, Level.L2):
                    if blob.at(level) and (entry.digest, level) not in seen:
                        seen.add((entry.digest, level))
                        for index in range(chunk_count(entry.size_bytes)):
                            yield _Place(manifest, entry, blob, level, index)

    async def _look(self, place: _Place, *, repair: bool) -> Damage | None:
        for _ in range(_LOOKS):
            if not place.blob.at(place.level):
                return None  # evicted while we were at other places
            ref = self._ref(place)
            if ref is None:
                return await self._damaged(place, None, "the blob is gone", repair=repair)
            why = await self._compare(place, ref)
            if why and self._ref(place) != ref:
                continue  # evicted, or brought again, while we looked
            return await self._damaged(place, ref, why, repair=repair) if why else None
        return None

    def _ref(self, place: _Place) -> FileRef | None:
        try:
            return self._services.storage.level(place.level).blob(place.blob.record.digest)
        except (NotFoundError, LevelError):
            return None

    async def _compare(self, place: _Place, ref: FileRef) -> str:
        """What is wrong with the chunk, or nothing."""
        expected = place.blob.record.crc64[place.index]
        try:
            answer = await self._services.runner.run(Checksum(ref, place.offset_bytes, place.length_bytes))
        except (NotFoundError, LevelError) as error:
            return error.message
        if not isinstance(answer, Moved):
            raise MoverError("a mover answered a checksum with something else")
        return "" if answer.crc64 == expected else f"expected crc64 {expected:016x}, found {answer.crc64:016x}"

    async def _damaged(self, place: _Place, ref: FileRef | None, why: str, *, repair: bool) -> Damage:
        services, record = self._services, place.blob.record
        services.metrics.checksum_failures.labels(level=place.level.value).inc()
        error = "" if repair else why
        if repair and ref is not None:
            error = await self._mend(place, ref)
        elif repair:
            error = why
        damage = Damage(
            name=place.manifest.name, revision=place.manifest.revision, path=place.entry.path, sha256=record.digest,
            level=place.level, chunk_index=place.index, offset_bytes=place.offset_bytes,
            length_bytes=place.length_bytes, repaired=repair and not error, error=error,
        )  # fmt: skip
        services.events.emit(
            "damage.repaired" if damage.repaired else "damage.found",
            f"chunk {place.index} of {place.entry.path} in {place.level}: {why}",
            name=damage.name, revision=damage.revision, path=damage.path, level=place.level.value, chunk=place.index,
            offset_bytes=place.offset_bytes, length_bytes=place.length_bytes,
        )  # fmt: skip
        if damage.repaired:
            services.metrics.repaired_chunks.labels(level=place.level.value).inc()
        elif repair:
            services.registry.quarantine(record.digest, f"chunk {place.index} of {place.entry.path}: {error}")
        if place.level is Level.L1 and not damage.repaired:
            services.registry.doubt(record.digest)
        if place.level is Level.L1:
            self.on_damage(place.manifest, place.entry, damage)
        return damage

    async def _mend(self, place: _Place, ref: FileRef) -> str:
        """Brings the chunk again, from the other level or by one ranged read of the origin. What failed, or nothing."""
        services, record = self._services, place.blob.record
        other = Level.L2 if place.level is Level.L1 else Level.L1
        disk = services.storage.level(other).blob(record.digest) if place.blob.at(other) else None
        fill = Fill(
            key=f"mend {record.digest}",
            runner=services.runner,
            clock=services.clock,
            target=ref,
            sources=Sources(
                disk=disk,
                origin=self._pulls.origin_of(place.manifest, place.entry),
                expected=dict(enumerate(record.crc64)),
            ),
            retry=services.retry,
            width=1,
        )
        try:
            await fill.mend(place.index)
        except IntegrityError as error:
            return f"{error.message} ({error.fields.get('check', 'checksum')})"
        except CachedError as error:
            return error.message
        return ""
