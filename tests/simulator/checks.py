"""The reference model of one life: what must hold at any step, after any call, and when nothing moves any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cached.cache.attachment import Attachment
from cached.cache.build import Parts
from cached.config import Config, resolve_capacity
from cached.level import Level
from cached.types import ModelSummary, Tier
from tests.simulator.world import NAMED, Holder, Violation, World

_BY_OPERATOR = "operator"


class Checks:
    """Of a daemon, from without as far as that goes. ``held``: the leases that workers have, with the workers."""

    def __init__(self, world: World, parts: Parts, config: Config) -> None:
        self.held: list[tuple[Attachment, Holder]] = []
        self._world = world
        self._storage = parts.services.storage
        self._registry = parts.services.registry
        self._describer = parts.describer
        self._pending = parts.evictor.pending_digests
        self._view = Path(config.daemon.models_dir)
        self._transient_capacity = config.l1.transient_capacity
        self._beside_bytes = 0
        self._full: dict[Level, tuple[int, int]] = {}

    def accounts(self) -> None:
        """At any step: accounts are the sums of their entries, and what a level has never grows beyond what it may.

        It may have more once its capacity was lowered, and where a daemon starts on what another left. Then it shrinks.
        """
        for level in self._storage.levels:
            ledger = self._storage.ledger(level)
            counted = sum(ledger.used.values()), sum(ledger.reservations.values())
            if counted != (ledger.used_bytes, ledger.reserved_bytes):
                raise Violation(
                    f"{level}: used and reserved are {ledger.used_bytes}, {ledger.reserved_bytes}: {counted}"
                )
            full_bytes, capacity_bytes = sum(counted), ledger.capacity_bytes
            before_bytes, before_capacity_bytes = self._full.get(level, (sum(counted), 0))
            if full_bytes > max(capacity_bytes, before_bytes) and capacity_bytes >= before_capacity_bytes:
                raise Violation(f"{level} grew from {before_bytes} to {full_bytes} bytes, of {capacity_bytes}")
            self._full[level] = full_bytes, capacity_bytes
        beside_bytes, budget_bytes = self._storage.transient_bytes, self._storage.budget_bytes(Level.L1)
        if beside_bytes > max(self._beside_bytes, resolve_capacity(self._transient_capacity, budget_bytes)):
            raise Violation(f"{beside_bytes} bytes are held beside a budget of {budget_bytes}, more than may be")
        self._beside_bytes = beside_bytes

    def inspect(self) -> None:
        """After each call: what is held is there and is what it was, and whoever comes by path finds something."""
        self.accounts()
        self._listed()
        for holder in self._world.holders:
            holder.look_again()
        for link in _links(self._view):
            if not os.path.exists(link):
                raise Violation(f"{link} leads to {os.readlink(link)}, which is not there")

    def _listed(self) -> None:
        """A list keeps the rows of what does not change: they are what a look at each model gives."""
        for row in self._describer.summaries():
            alone = self._describer.summary(self._registry.models[row.name])
            if row != alone:
                raise Violation(f"the list has {row}, and it is {alone}")

    def left_l1(self) -> list[str]:
        """What is held and has no name in L1 any more, by which the worker's segment or its content is known."""
        left: list[str] = []
        inodes, digests = set[int](), set[str]()
        for entry in os.scandir(self._world.l1):
            _, _, kind, own_id = entry.name.split(".")
            if kind in NAMED:
                inodes.add(entry.inode())
                digests.add(own_id)
        for _, holder in self.held:
            if holder.tainted or holder.evicted:
                continue
            gone = [
                holder.files[index].path
                for index, digest in holder.digests.items()
                if digest not in digests and os.fstat(holder.fds[index]).st_ino not in inodes
            ]
            if gone:
                left.append(f"{gone} of {holder.name}@{holder.revision[:8]}")
        return left

    def evicted(self, name: str, revision: str, level: str, reason: str) -> str:
        """What is wrong with an eviction that the daemon tells of; nothing, if nothing is.

        Whoever is told to evict by the operator refuses what is held; beside that it chooses for itself.
        """
        model = self._registry.models.get(name)
        if model is None or reason == _BY_OPERATOR:
            return ""
        if any((holder.name, holder.revision) == (name, revision) for _, holder in self.held):
            return f"{name}@{revision[:8]}, which a worker holds, was chosen as a victim in {level}: {reason}"
        if model.record.current_revision == revision and (model.pinned or model.tier[0] is Tier.HOT):
            return (
                f"{name}, which is {'pinned' if model.pinned else 'hot'}, was chosen as a victim in {level}: {reason}"
            )
        return ""

    def remembered(self, summaries: tuple[ModelSummary, ...]) -> None:
        """After a start: what operators were told is done, is done, if the index could be written."""
        pinned = {summary.name: summary.pinned for summary in summaries}
        for name, said in self._world.pinned.items():
            if said != pinned.get(name, False) and "store_fails" not in self._world.faults.hit:
                raise Violation(f"{name} was {'pinned' if said else 'unpinned'}, and a new daemon does not know it")

    def at_rest(self) -> None:
        """Accounts, folders and records agree."""
        self._storage.check()
        self._world.check_blobs()
        owned = {digest for manifest in self._registry.manifests() for digest in manifest.blobs} | self._pending()
        for level, folder in ((Level.L1, self._world.l1), (Level.L2, self._world.l2)):
            ledger = self._storage.ledger(level)
            there = self._world.blobs(folder)
            counted = {key[5:]: size for key, size in ledger.used.items() if key.startswith("blob:")}
            if there != counted:
                raise Violation(
                    f"{level}: {_short(there, counted)} are there and not counted, "
                    f"{_short(counted, there)} counted and not there"
                )
            if there.keys() - owned:
                raise Violation(f"{level}: {sorted(there.keys() - owned)} belong to no revision")
            if ledger.used_bytes > ledger.capacity_bytes:
                raise Violation(f"{level}: {ledger.used_bytes} bytes of {ledger.capacity_bytes}")
        self._shown()

    def _shown(self) -> None:
        """Each model that is here is shown, with each file leading to its blob."""
        for model in self._registry.models.values():
            manifest = model.current
            if manifest is None or not self._registry.is_here(manifest) or self._registry.is_quarantined(manifest):
                continue
            for entry in manifest.files:
                link = self._view / ".views" / f"{manifest.name}@{manifest.revision}" / entry.path
                if not os.path.realpath(link).endswith(entry.digest):
                    raise Violation(f"{link.relative_to(self._view)} does not lead to {entry.digest[:12]}")


def _short(blobs: dict[str, int], without: dict[str, int]) -> dict[str, int]:
    return {digest[:8]: size for digest, size in blobs.items() if digest not in without}


def _links(folder: Path | str) -> Iterator[str]:
    """All below it."""
    if os.path.isdir(folder):
        for entry in os.scandir(folder):
            if entry.is_symlink():
                yield entry.path
            elif entry.is_dir():
                yield from _links(entry.path)
