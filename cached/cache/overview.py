"""One look at everything: what is where, what moves, who holds what. Made on request; nothing here changes anything."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from heapq import nsmallest
from itertools import islice

from cached.cache.cold_starts import ColdStarts
from cached.cache.describe import Describer
from cached.cache.evictor import Evictor
from cached.cache.load import Load
from cached.cache.loader import Loader
from cached.cache.pace import Pace, Written, speed_bytes_per_s
from cached.cache.pulls import Pulls
from cached.cache.registry import Model, Presence
from cached.cache.services import Services
from cached.leases import Lease, LeaseTable
from cached.level import Level
from cached.overview import Holding, LevelUse, Limits, Move, MoveKind, MovePhase, Overview, Problem
from cached.refs import artifact_digest
from cached.types import LeaseInfo, LevelStats, ModelSummary, Stats, Tier
from cached.units import chunk_length

_NAMED = 3
"""Of those that wait for a load."""
_PROBLEMS = 20
_REST = 50
"""Blobs are counted no sooner again than after so many times what it took: 2 % of the loop, however many there are."""
_TIERS = {Tier.HOT: Holding.HOT, Tier.WARM: Holding.WARM, Tier.AUTO: Holding.AUTO, Tier.COLD: Holding.COLD}
_STRENGTH = {holding: strength for strength, holding in enumerate(Holding)}


class Overviews:
    """Loop only."""

    def __init__(
        self,
        services: Services,
        loader: Loader,
        leases: LeaseTable,
        evictor: Evictor,
        pulls: Pulls,
        describer: Describer,
        cold_starts: ColdStarts,
    ) -> None:
        self._services = services
        self._loader = loader
        self._leases = leases
        self._evictor = evictor
        self._pulls = pulls
        self._describer = describer
        self._cold_starts = cold_starts
        self._counted: dict[Level, tuple[Counter[Holding], int]] = {}
        self._count_again_s = float("-inf")

    def now(self, stats: Stats, limits: Limits, sees: Callable[[str], bool] | None = None) -> Overview:
        """What there is at this moment; of lists no more than ``limits`` say. ``sees``: of these models alone."""
        known = [item for item in self._services.registry.models.values() if not artifact_digest(item.name)]
        models = [item for item in known if sees is None or sees(item.name)]
        moves = [move for move in self._moves() if sees is None or sees(move.name)]
        events = [item for item in self._services.events.decisions if sees is None or (item.name and sees(item.name))]
        return Overview(
            time_s=self._services.clock.wall_s(),
            stats=stats,
            uses=self._uses(stats),
            models=self._summaries(models, {move.name for move in moves}, limits.models),
            model_count=len(models),
            moves=tuple(moves[: limits.moves]),
            move_count=len(moves),
            leases=self._lease_infos(limits.leases, sees),
            events=tuple(events[: -limits.events - 1 : -1]),
            cold_starts=self._cold_starts.latest(limits.cold_starts, sees),
            problems=(*(self._degraded() if sees is None else ()), *islice(self._failed(models), _PROBLEMS)),
        )

    # Models and leases.

    def _summaries(self, models: list[Model], moving: set[str], limit: int) -> tuple[ModelSummary, ...]:
        """Only those that are shown are looked at closely."""
        ranked = nsmallest(limit, ((self._rank(model, moving), model.name) for model in models))
        return tuple(self._describer.summary(self._services.registry.models[name]) for _, name in ranked)

    def _rank(self, model: Model, moving: set[str]) -> int:
        registry, manifest = self._services.registry, model.current
        if model.name in moving:
            return 0
        if manifest is None:
            return 4
        if registry.is_quarantined(manifest):
            return 1
        present = registry.present(manifest)
        return 2 if present.l1_bytes else 3 if present.l2_bytes else 4

    def _lease_infos(self, limit: int, sees: Callable[[str], bool] | None) -> tuple[LeaseInfo, ...]:
        leases = (lease for lease in self._leases if sees is None or sees(lease.name))
        return tuple(lease.info() for lease in nsmallest(limit, leases, key=_lease_order))

    # What is wrong.

    def _degraded(self) -> Iterator[Problem]:
        for about, message in self._services.degraded.items():
            if about != "quarantine":  # each model is told by itself
                yield Problem(about, message)

    def _failed(self, models: list[Model]) -> Iterator[Problem]:
        """Models of which nothing could be brought, or whose content is damaged."""
        registry = self._services.registry
        for model in models:
            manifest = model.current
            if manifest is not None and registry.is_quarantined(manifest):
                yield Problem("model", model.record.last_error or "its content is damaged here", model.name)
            elif model.record.last_error and (manifest is None or not registry.is_here(manifest)):
                yield Problem("model", model.record.last_error, model.name)

    # Levels.

    def _uses(self, stats: Stats) -> tuple[LevelUse, ...]:
        now_s = self._services.clock.monotonic_s()
        if now_s >= self._count_again_s:
            began_s = time.thread_time()
            self._counted = self._count()
            self._count_again_s = now_s + _REST * (time.thread_time() - began_s)
        return tuple(self._use(level, *self._counted[level.level]) for level in stats.levels)

    def _use(self, stats: LevelStats, counted: Mapping[Holding, int], leased_bytes: int) -> LevelUse:
        found: dict[Holding, int] = {**dict.fromkeys(Holding, 0), **counted}
        found[Holding.WITHDRAWN] = stats.withdrawn_bytes
        found[Holding.POOL] = stats.pool_bytes
        found[Holding.PARTIAL] += max(0, stats.used_bytes - sum(found.values()))
        found[Holding.RESERVED] = stats.reserved_bytes
        found[Holding.FREE] = max(0, stats.capacity_bytes - stats.used_bytes - stats.reserved_bytes)
        return LevelUse(stats.level, found, leased_bytes)

    def _count(self) -> dict[Level, tuple[Counter[Holding], int]]:
        """Of each level the bytes of its blobs, by what keeps them, and those that workers hold."""
        holdings, leased = self._holdings(), self._leased()
        l1, l2, l1_leased_bytes, l2_leased_bytes = Counter[Holding](), Counter[Holding](), 0, 0
        for digest, blob in self._services.registry.blobs.items():
            size_bytes, holding = blob.record.size_bytes, holdings.get(digest, Holding.PARTIAL)
            leased_bytes = size_bytes if digest in leased else 0
            if blob.l1 is not Presence.ABSENT:
                l1[holding] += size_bytes
                l1_leased_bytes += leased_bytes
            if blob.l2:
                l2[holding] += size_bytes
                l2_leased_bytes += leased_bytes
        return {Level.L1: (l1, l1_leased_bytes), Level.L2: (l2, l2_leased_bytes)}

    def _holdings(self) -> dict[str, Holding]:
        """Of each blob what keeps it longest."""
        found: dict[str, Holding] = {}
        for holding, digests in sorted(self._held(), key=lambda held: -_STRENGTH[held[0]]):
            found.update(dict.fromkeys(digests, holding))
        return found

    def _held(self) -> Iterator[tuple[Holding, Iterable[str]]]:
        """Of known revisions, and of those that are arriving: files that have come are blobs before the rest is."""
        models = self._services.registry.models
        for model in models.values():
            for manifest in model.manifests.values():
                yield self._holding(model, manifest.revision), [entry.digest for entry in manifest.files]
        for load in self._loader.loads.values():
            if load.plan.name in models:
                holding = self._holding(models[load.plan.name], load.plan.revision)
                yield holding, filter(None, map(load.digest_of, load.plan.files))

    def _holding(self, model: Model, revision: str) -> Holding:
        if model.pinned:
            return Holding.PINNED
        return Holding.TRANSIENT if self._evictor.is_transient(model.name, revision) else _TIERS[model.tier[0]]

    def _leased(self) -> set[str]:
        models = self._services.registry.models
        held = (models[name].manifests.get(revision) for name, revision in self._leases.leased() if name in models)
        return {entry.digest for manifest in held if manifest is not None for entry in manifest.files}

    # Moves.

    def _moves(self) -> Iterator[Move]:
        for load in sorted(self._loader.loads.values(), key=lambda load: load.started_s):
            yield self._move(load)
        for written in self._services.writes.values():
            yield self._write(written)
        for name in self._pulls.resolving:
            yield Move(MoveKind.PULL, MovePhase.RESOLVING, name, "", Level.L1)

    def _move(self, load: Load) -> Move:
        plan, now_s = load.plan, self._services.clock.monotonic_s()
        flights = list(load.flights.values())
        behind = [flight.written for flight in flights if flight.written is not None]
        total_bytes = _wanted_bytes(load)
        done_bytes = min(total_bytes, sum(map(load.bytes_from, Level)) + load.resident_bytes)
        phase, kind = _phase(load, behind, left_bytes=total_bytes - done_bytes), self._kind(load)
        paces = [item.pace for item in (behind if phase is MovePhase.WRITING else flights)]
        waiting = [lease.holder for lease in self._leases.of(plan.name, plan.revision) if not lease.complete]
        return Move(
            kind=kind,
            phase=phase,
            name=plan.name,
            revision=plan.revision,
            level=plan.level,
            source=plan.source if kind is MoveKind.PULL else "",
            total_bytes=total_bytes,
            done_bytes=done_bytes,
            behind_total_bytes=sum(item.total_bytes for item in behind),
            behind_bytes=sum(item.done_bytes for item in behind),
            speed_bytes_per_s=speed_bytes_per_s(paces, now_s),
            elapsed_s=now_s - load.started_s,
            waiting=tuple(waiting[:_NAMED]),
            waiting_count=len(waiting),
            partial=plan.is_part,
        )

    def _kind(self, load: Load) -> MoveKind:
        """By where its bytes come from, as far as that is seen; else by where they are to come from."""
        orders = load.plan.orders.values()
        if orders and all(order.adopt for order in orders):
            return MoveKind.CONFIRM
        if load.bytes_from(Level.L3):
            return MoveKind.PULL
        blobs = self._services.registry.blobs
        here = all(order.adopt or (order.digest in blobs and blobs[order.digest].l2) for order in orders)
        return MoveKind.PROMOTE if here and load.plan.level is Level.L1 else MoveKind.PULL

    def _write(self, written: Written) -> Move:
        pace: Pace = written.pace
        now_s = self._services.clock.monotonic_s()
        names = self._services.registry.sharers(written.digest, but="")
        return Move(
            kind=MoveKind.WRITE,
            phase=MovePhase.WRITING,
            name=names[0] if names else written.digest[:12],
            revision="",
            level=Level.L2,
            total_bytes=written.total_bytes,
            done_bytes=written.done_bytes,
            behind_total_bytes=written.total_bytes,
            behind_bytes=written.done_bytes,
            speed_bytes_per_s=speed_bytes_per_s([pace], now_s),
            elapsed_s=now_s - pace.began_s,
        )


def _lease_order(lease: Lease) -> tuple[bool, float]:
    return (lease.complete, -lease.since_s)


def _wanted_bytes(load: Load) -> int:
    """What is to be there in the end: all of the model, or the chunks that were asked for."""
    plan = load.plan
    if not plan.is_part:
        return plan.total_bytes
    return sum(chunk_length(file.size_bytes, index) for file in plan.files for index in file.chunks or ())


def _phase(load: Load, behind: list[Written], *, left_bytes: int) -> MovePhase:
    if load.ready_as is not None and any(item.done_bytes < item.total_bytes for item in behind):
        return MovePhase.WRITING
    if not load.opened:
        return MovePhase.WAITING
    return MovePhase.MOVING if left_bytes > 0 else MovePhase.VERIFYING
