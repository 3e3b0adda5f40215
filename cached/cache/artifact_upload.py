"""Uploads saved compile artifacts to the destination, behind the save: until it worked, and across restarts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace

from cached.cache.artifact_key import KEY_PATH, Destination
from cached.cache.evictor import Evictor
from cached.cache.resolver import Resolver
from cached.cache.services import Services
from cached.errors import CachedError, IntegrityError, MoverError
from cached.level import Level
from cached.manifest import FileEntry, Manifest
from cached.refs import artifact_digest
from cached.transfer.jobs import Checksum, Listing, Moved, Upload

_LOOK_S = 5.0
_FIRST_DELAY_S = 5.0
_MAX_DELAY_S = 300.0


class ArtifactUploads:
    """What is still to be uploaded is what has no source: a restarted daemon goes on by itself."""

    def __init__(self, services: Services, evictor: Evictor, resolver: Resolver, destination: Destination) -> None:
        self._services = services
        self._evictor = evictor
        self._resolver = resolver
        self._destination = destination
        self._wanted = asyncio.Event()
        self._delays_s: dict[str, float] = {}
        self._not_before_s: dict[str, float] = {}
        self.errors: dict[str, str] = {}
        """Artifact → why its last upload failed."""

    def wake(self) -> None:
        """There is something new."""
        self._wanted.set()

    async def run(self) -> None:
        """Until cancelled; at once where there is no destination."""
        while self._destination.uri:
            self._wanted.clear()
            for manifest in self._due():
                await self._try(manifest)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wanted.wait(), _LOOK_S)

    def _due(self) -> list[Manifest]:
        registry, now_s = self._services.registry, self._services.clock.monotonic_s()
        models = [model for name, model in registry.models.items() if artifact_digest(name)]
        return [
            manifest
            for model in models
            if (manifest := model.current) is not None
            and not manifest.source
            and registry.whole_at(manifest, Level.L2)
            and now_s >= self._not_before_s.get(model.name, 0.0)
        ]

    async def _try(self, manifest: Manifest) -> None:
        name, services = manifest.name, self._services
        try:
            with self._evictor.busy(manifest):
                await self._upload(manifest)
        except CachedError as error:
            delay_s = min(_MAX_DELAY_S, 2 * self._delays_s.get(name, _FIRST_DELAY_S / 2))
            self._delays_s[name] = delay_s
            self._not_before_s[name] = services.clock.monotonic_s() + delay_s
            self.errors[name] = error.message
            services.failures.report(
                "artifact.upload_failed", error, f"{name}: {error.message}", name=name, retry_s=delay_s
            )
            services.degraded.began("artifacts", f"a compile artifact cannot be uploaded: {error.message}", error)
        except Exception as bug:  # noqa: BLE001 - told; the others are worth a try
            self.errors[name] = services.failures.bug("artifact upload", bug, name=name).message
            self._not_before_s[name] = services.clock.monotonic_s() + _MAX_DELAY_S
        else:
            for told in (self.errors, self._delays_s, self._not_before_s):
                told.pop(name, None)
            if not self.errors:
                services.degraded.ended("artifacts")

    async def _upload(self, manifest: Manifest) -> None:
        """The archive first: an artifact without its key does not exist yet."""
        source = self._destination.source_of(manifest.name)
        stored: dict[str, FileEntry] = {}
        for entry in sorted(manifest.files, key=lambda entry: entry.path == KEY_PATH):
            await self._check(manifest, entry)
            ref = self._services.storage.level(Level.L2).blob(entry.digest)
            answer = await self._services.runner.run(Upload(self._resolver.spec_of(source), ref, entry.path))
            if not isinstance(answer, Listing):
                raise MoverError("a mover answered an upload with something else")
            stored[entry.path] = replace(entry, version=answer.items[0].version)
        registry = self._services.registry
        model = registry.models.get(manifest.name)
        if model is None or model.manifests.get(manifest.revision) is not manifest:
            return  # removed, or replaced by itself, meanwhile
        files = tuple(stored[entry.path] for entry in manifest.files)
        registry.replace_manifest(replace(manifest, source=source, files=files))
        self._services.events.emit(
            "artifact.uploaded", f"{manifest.name} is at {source}", name=manifest.name, revision=manifest.revision,
            source=source,
        )  # fmt: skip

    async def _check(self, manifest: Manifest, entry: FileEntry) -> None:
        """Nothing that the disk has damaged meanwhile leaves this host."""
        record = self._services.registry.blobs[entry.digest].record
        ref = self._services.storage.level(Level.L2).blob(entry.digest)
        for index in range(len(record.crc64)):
            offset_bytes, length_bytes, crc64 = record.chunk(index)
            answer = await self._services.runner.run(Checksum(ref, offset_bytes, length_bytes))
            if isinstance(answer, Moved) and answer.crc64 != crc64:
                self._services.metrics.checksum_failures.labels(level="l2").inc()
                raise IntegrityError(
                    f"{entry.path} of {manifest.name} is damaged on disk, and was not uploaded",
                    hint=f"remove it and save it again: cached artifact rm {manifest.name}",
                    name=manifest.name, path=entry.path, check="crc64",
                )  # fmt: skip
