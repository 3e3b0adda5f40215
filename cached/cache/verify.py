"""Reads every byte again and compares it with its chunk checksums, on request; see Inspector for what is damaged."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

from cached.cache.inspector import Inspector, Place, places_of
from cached.cache.services import Services
from cached.level import Level
from cached.manifest import Manifest
from cached.signals import run_all
from cached.types import Damage, VerifyProgress


class Verifier:
    """Loop only."""

    def __init__(self, services: Services, inspector: Inspector) -> None:
        self._services = services
        self._inspector = inspector

    async def verify(self, manifests: list[Manifest], *, repair: bool) -> AsyncIterator[VerifyProgress]:
        """Progress, each damage as it is found, and a last message with ``finished``."""
        places = list(self._places(manifests))
        total = sum(place.length_bytes for place in places)
        done = damaged = repaired = 0
        wrong: set[tuple[str, Level]] = set()
        for start in range(0, len(places), self._services.width):
            batch = places[start : start + self._services.width]
            for place, damage in zip(batch, await self._look(batch, repair=repair), strict=True):
                done += place.length_bytes
                if damage is not None:
                    damaged += 1
                    repaired += damage.repaired
                    if not damage.repaired:
                        wrong.add((damage.sha256, damage.level))
                    yield VerifyProgress(total, done, damage, False, damaged, repaired)
            yield VerifyProgress(total, done, None, False, damaged, repaired)
        self._settle(places, wrong)
        yield VerifyProgress(total, done, None, True, damaged, repaired)

    async def _look(self, batch: list[Place], *, repair: bool) -> list[Damage | None]:
        """At all of them at once; the first failure ends the others."""
        found: list[Damage | None] = [None] * len(batch)

        async def one(at: int, place: Place) -> None:
            found[at] = await self._inspector.look(place, repair=repair)

        await run_all(*(one(at, place) for at, place in enumerate(batch)))
        return found

    def _settle(self, places: list[Place], wrong: set[tuple[str, Level]]) -> None:
        """What has no damage left is out of quarantine, and was verified now wherever it is."""
        still_damaged = {digest for digest, _ in wrong}
        for digest, level in {(place.blob.record.digest, place.level) for place in places} - wrong:
            self._services.verified.note(digest, level)
            if digest not in still_damaged:
                self._services.mended(digest)

    def _places(self, manifests: list[Manifest]) -> Iterator[Place]:
        seen: set[tuple[str, Level]] = set()
        for manifest in manifests:
            for entry in manifest.files:
                blob = self._services.registry.blobs[entry.digest]
                for level in (Level.L1, Level.L2):
                    if blob.at(level) and (entry.digest, level) not in seen:
                        seen.add((entry.digest, level))
                        yield from places_of(manifest, entry, blob, level)
