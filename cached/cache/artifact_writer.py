"""Takes the archive of a compile artifact in: verified as it comes, committed as every blob is, recorded at the end."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from cached.artifact_types import ArtifactOffer
from cached.cache.artifact_key import KEY_PATH, archive_path
from cached.cache.checks import confirm_there
from cached.cache.evictor import Evictor, Wanted
from cached.cache.loader import Loader
from cached.cache.services import Services
from cached.checksum import crc64nvme
from cached.errors import IntegrityError, LevelError, NoRoomError, TimeoutExpiredError
from cached.level import Level
from cached.levels.base import FileRef
from cached.levels.files import level_errors, open_checked
from cached.manifest import BlobRecord, FileEntry, Manifest, revision_of
from cached.policy import Otherwise
from cached.types import CheckedBy
from cached.units import CHUNK_BYTES

_SILENT_S = 60.0
"""A worker that was stopped in the middle must not hold the room for ever."""


@dataclass(frozen=True, slots=True)
class _File:
    """A file on its way: what it must be, and the ingest that it is written to."""

    path: str
    size_bytes: int
    digest: str
    ingest_id: str


class ArtifactWriter:
    """Loop only; bytes are written and hashed in threads."""

    def __init__(self, services: Services, loader: Loader, evictor: Evictor) -> None:
        self._services = services
        self._loader = loader
        self._evictor = evictor

    async def write(
        self, name: str, document: bytes, offer: ArtifactOffer, generation: int, data: AsyncIterator[bytes]
    ) -> Manifest:
        """Makes the artifact the current revision of ``name``, once all of it is durable in L2.

        Raises NoRoomError, LevelError, IntegrityError for bytes that are not those of the offer, TimeoutExpiredError
        for a worker that stops sending. Whatever ends it early leaves nothing.
        """
        services = self._services
        if not services.storage.has(Level.L2):
            raise LevelError(
                "compile artifacts are kept in L2, which is switched off", hint="set l2.enabled", level="l2"
            )
        files = (
            _File(KEY_PATH, len(document), hashlib.sha256(document).hexdigest(), secrets.token_hex(16)),
            _File(archive_path(generation, offer.sha256), offer.size_bytes, offer.sha256, secrets.token_hex(16)),
        )
        revision = revision_of((file.path, file.size_bytes, f"sha256:{file.digest}") for file in files)
        earlier = services.registry.known(name).current
        try:
            sizes = {file.ingest_id: file.size_bytes for file in files}
            async with self._evictor.opening:
                await self._evictor.open(Wanted(Level.L2, sizes, name, revision, Otherwise.EVICT, digests=()))
            manifest = await self._fill(name, revision, files, document, data)
        except BaseException:  # a worker that was killed leaves nothing either
            services.registry.forget_if_unknown(services.registry.known(name))
            raise
        finally:
            for file in files:
                services.storage.discard(Level.L2, file.ingest_id)  # ignored once it is committed
        self._drop(earlier, manifest)
        return manifest

    async def _fill(
        self, name: str, revision: str, files: tuple[_File, ...], document: bytes, data: AsyncIterator[bytes]
    ) -> Manifest:
        key, archive = files
        records = [await self._take(name, key, _once(document)), await self._take(name, archive, data)]
        services = self._services
        with self._loader.saving([record.digest for record in records]):
            for file, record in zip(files, records, strict=True):
                arrived = services.storage.level(Level.L2).ingest(file.ingest_id)
                await confirm_there(services, Level.L2, record, arrived)
                await services.storage.commit(Level.L2, file.ingest_id, record)
                services.landed(record, Level.L2)
            entries = tuple(
                FileEntry(file.path, file.size_bytes, file.digest, CheckedBy.CATALOG_SHA256) for file in files
            )
            manifest = Manifest(
                name=name, revision=revision, source="", files=entries, created_time_s=services.clock.wall_s()
            )
            services.registry.add_manifest(manifest)
            await services.registry.durable()
        services.publish(manifest)
        return manifest

    async def _take(self, name: str, file: _File, data: AsyncIterator[bytes]) -> BlobRecord:
        storage = self._services.storage
        landing, disk = _Landing(storage.level(Level.L2).ingest(file.ingest_id)), storage.disk
        assert disk is not None  # noqa: S101 - the line above
        try:
            pieces = aiter(data)
            while (piece := await _next(pieces)) is not None:
                if landing.size_bytes + len(piece) > file.size_bytes:
                    raise _mismatch(name, file, "size", f"more than {file.size_bytes}")
                await disk.in_thread(landing.write, piece)  # its descriptor is closed behind it
        finally:
            landing.close()
        if landing.size_bytes != file.size_bytes:
            raise _mismatch(name, file, "size", str(landing.size_bytes))
        if landing.sha256 != file.digest:
            raise _mismatch(name, file, "sha256", landing.sha256)
        return BlobRecord(file.digest, file.size_bytes, landing.crc64)

    def _drop(self, earlier: Manifest | None, current: Manifest) -> None:
        """What took its place leaves the host, unless somebody holds it; the policy has that go first."""
        if earlier is None or earlier.revision == current.revision:
            return  # the same once more, after it was evicted
        if self._loader.is_loading(earlier.name, earlier.revision):
            return
        if self._evictor.is_leased(earlier.name, earlier.revision) or self._evictor.is_busy(earlier):
            return
        for level in self._services.storage.levels:
            with suppress(LevelError, NoRoomError):  # told: the level is degraded
                self._evictor.evict([earlier], level, "artifact")


class _Landing:
    """The ingest that bytes are written to in order, with their checksums. One thread at a time."""

    def __init__(self, ref: FileRef) -> None:
        self._path = ref.path
        self._fd = open_checked(Level.L2, ref.path, os.O_WRONLY, ref)
        self._digest = hashlib.sha256()
        self._crc64: list[int] = []
        self.size_bytes = 0

    def write(self, piece: bytes) -> None:
        """Blocks. Raises LevelError, or NoRoomError."""
        with memoryview(piece) as view, level_errors(Level.L2, self._path, "write", len(piece)):
            self._digest.update(view)
            while view:
                at_bytes = self.size_bytes % CHUNK_BYTES
                step = os.pwrite(self._fd, view[: CHUNK_BYTES - at_bytes], self.size_bytes)
                if at_bytes == 0:
                    self._crc64.append(0)
                self._crc64[-1] = crc64nvme(view[:step], self._crc64[-1])
                self.size_bytes += step
                view = view[step:]  # noqa: PLW2901 the rest

    def close(self) -> None:
        os.close(self._fd)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def crc64(self) -> tuple[int, ...]:
        return tuple(self._crc64)


async def _next(pieces: AsyncIterator[bytes]) -> bytes | None:
    try:
        async with asyncio.timeout(_SILENT_S):
            return await anext(pieces, None)
    except TimeoutError:
        raise TimeoutExpiredError(
            f"nothing came for {_SILENT_S:g} s in the middle of a compile artifact", hint="save it again",
            what="the next piece", timeout_s=_SILENT_S,
        ) from None  # fmt: skip


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def _mismatch(name: str, file: _File, check: str, found: str) -> IntegrityError:
    expected = file.digest if check == "sha256" else str(file.size_bytes)
    return IntegrityError(
        f"what was sent as {file.path} of {name} is not what was offered: {check} {found} instead of {expected}",
        hint="nothing was kept; save it again when nothing writes to the directory any more",
        name=name, path=file.path, check=check, expected=expected, found=found,
    )  # fmt: skip
