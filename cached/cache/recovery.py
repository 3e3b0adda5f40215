"""What an earlier daemon left: adopted, resumed or removed. Nothing of ours stays without an owner."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import structlog

from cached.cache.loader import Loader
from cached.cache.pulls import Pulls
from cached.cache.registry import Presence, Registry
from cached.cache.services import Services
from cached.errors import CachedError, LevelError, NoRoomError
from cached.level import Level
from cached.levels.base import Found
from cached.manifest import Manifest
from cached.refs import Ref
from cached.types import Tier

_log = structlog.get_logger(__name__)

_ORDER = (Tier.HOT, Tier.WARM, Tier.AUTO, Tier.COLD)


class Recovery:
    """``recover`` once, before anything is served; ``resume`` after, in the background."""

    def __init__(self, services: Services, loader: Loader, pulls: Pulls) -> None:
        self._services = services
        self._loader = loader
        self._pulls = pulls

    async def recover(self) -> None:
        """Reads the index, compares it with what the levels hold, and accounts for all of it. Moves no bytes.

        What the levels hold is looked at in threads: a disk that hangs keeps nobody from asking, or from stopping us.
        """
        registry = self._services.registry
        registry.load()
        self._services.history.load()
        whole = {ingest for pull in registry.index.pending() for ingest in pull.ingests}
        pending = whole | self._services.part_ingests()
        wanted = {entry.digest for manifest in registry.manifests() for entry in manifest.files} | self._landed(pending)
        learned = self._learn_landed(pending)
        for level in self._services.storage.levels:
            try:
                await self._take_stock(level, wanted, pending, whole)
            except (LevelError, NoRoomError) as error:
                self._services.degraded.began(level.value, f"{level} could not be read: {error.message}", error)
        for digest in learned:
            registry.forget_blob(digest)  # unless it was found
        self._forget_what_is_nowhere(registry)
        self._services.remove_journals(keep=pending)
        try:
            self._services.view.clear()
        except LevelError as error:
            self._services.degraded.began("view", error.message, error)
        for manifest in registry.manifests():
            self._services.publish(manifest)

    def _landed(self, pending: AbstractSet[str]) -> set[str]:
        """Blobs of interrupted pulls that were committed before their revision could be recorded."""
        return {digest for ingest in pending if (digest := self._services.journal_digest(ingest))}

    def _learn_landed(self, pending: AbstractSet[str]) -> list[str]:
        """Blobs that were committed within the moment that the index is behind: their journals know them."""
        registry = self._services.registry
        records = [record for ingest in sorted(pending) if (record := self._services.journal_record(ingest))]
        learned = [record.digest for record in records if record.digest not in registry.blobs]
        for record in records:
            registry.learn(record)
        return learned

    async def _take_stock(
        self, level: Level, wanted: set[str], pending: AbstractSet[str], whole: AbstractSet[str]
    ) -> None:
        """``whole``: of the pending ingests those that are to become blobs, and keep their room for that."""
        services, storage = self._services, self._services.storage
        found: Found = await storage.scan(level)
        for digest, size_bytes in found.blobs.items():
            blob = services.registry.blobs.get(digest)
            storage.adopt(level, digest, size_bytes)
            if blob is None or digest not in wanted or blob.record.size_bytes != size_bytes:
                self._drop(level, digest)
            else:
                services.registry.found(digest, level)
        for ingest_id, size_bytes in found.ingests.items():
            storage.keep_ingest(level, ingest_id, size_bytes, sparse=ingest_id not in whole)
            if ingest_id not in pending:
                storage.discard(level, ingest_id)
        if found.failed:
            services.degraded.began("l2_drives", "; ".join(found.failed))
        for name in found.set_aside:
            _log.warning("recovery.set_aside", level=level.value, name=name)

    def _drop(self, level: Level, digest: str) -> None:
        """A blob that no revision has. Where it cannot be removed (a disk is read-only, say) it goes on counting."""
        try:
            self._services.storage.drop(level, digest)
        except CachedError as error:
            _log.warning("recovery.not_removed", level=level.value, digest=digest, chain=error.chain)
        else:
            _log.warning("recovery.removed_blob", level=level.value, digest=digest, cause="no revision has it")

    def _forget_what_is_nowhere(self, registry: Registry) -> None:
        """Old revisions that are not whole here are of no use; the current one stays known by name."""
        for manifest in list(registry.manifests()):
            current = registry.models[manifest.name].record.current_revision
            if manifest.revision != current and not registry.is_here(manifest):
                registry.forget_revision(manifest)

    async def resume(self) -> None:
        """Confirms what is in L1, the hottest first, and begins interrupted pulls again."""
        registry = self._services.registry
        await self._confirm(whole=True)
        await self._confirm(whole=False)
        self._drop_unconfirmed()
        for pull in registry.index.pending():
            self._services.events.emit("pull.resumed", f"going on with {pull.name}", name=pull.name)
            self._pulls.begin(
                Ref(pull.name), source="" if self._catalogued(pull.name) else pull.source, level=pull.level,
                unattended=True,
            )  # fmt: skip

    async def _confirm(self, *, whole: bool) -> None:
        """Of revisions that are ``whole`` in L1; or what there is of others, half promoted or half evicted."""
        registry = self._services.registry
        for manifest in sorted(registry.manifests(), key=self._urgency):
            if manifest.revision not in registry.known(manifest.name).manifests:
                continue  # forgotten while others were confirmed
            unconfirmed = any(blob.l1 is Presence.UNCONFIRMED for blob in registry.blobs_of(manifest))
            if not unconfirmed or registry.resident(manifest, Level.L1) is not whole:
                continue
            load = self._pulls.promote(manifest) if whole else self._pulls.confirm(manifest)
            try:
                await load.until_ready()
            except CachedError as error:
                _log.warning("recovery.not_adopted", model=manifest.name, chain=error.chain)

    def _catalogued(self, name: str) -> bool:
        model = self._services.registry.models.get(name)
        return model is not None and model.catalog is not None

    def _urgency(self, manifest: Manifest) -> tuple[int, int, float]:
        model = self._services.registry.models[manifest.name]
        return _ORDER.index(model.tier[0]), -model.priority, -model.record.last_used_wall_s

    def _drop_unconfirmed(self) -> None:
        """Segments of revisions that are not whole in L1 and could not be confirmed: nobody may have them.

        Those of interrupted pulls stay: the pull that goes on confirms them. So do those of whole revisions, which no
        mover could look at yet: whoever attaches next has them confirmed.
        """
        registry, held = self._services.registry, set(self._loader.held_digests())
        for whole in registry.manifests():
            if registry.resident(whole, Level.L1):
                held |= whole.blobs.keys()
        for pull in registry.index.pending():
            held |= self._landed(set(pull.ingests))
            model = registry.models.get(pull.name)
            manifest = model.manifests.get(pull.revision) if model else None
            held |= manifest.blobs.keys() if manifest else set()
        for digest, blob in registry.blobs.items():
            if blob.l1 is Presence.UNCONFIRMED and digest not in held:
                registry.lost(digest, Level.L1)
                self._services.storage.withdraw(digest)
