"""Builds the engine's parts from the configuration, and joins them."""

from __future__ import annotations

import asyncio
import grp
import hashlib
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cached.cache.artifacts import Artifacts, destination_of
from cached.cache.cold_starts import ColdStarts
from cached.cache.content import Contents
from cached.cache.describe import Describer
from cached.cache.disk_work import DiskWork
from cached.cache.events import EventBus
from cached.cache.evictor import Evictor
from cached.cache.explainer import Explainer
from cached.cache.failures import Degraded, Failures
from cached.cache.foresight import Foresight
from cached.cache.history import UseHistory
from cached.cache.inspector import Inspector
from cached.cache.links import DirectoryView
from cached.cache.loader import Loader
from cached.cache.node_labels import NodeLabels
from cached.cache.overview import Overviews
from cached.cache.pool_keeper import PoolKeeper
from cached.cache.pulls import Pulls
from cached.cache.recovery import Recovery
from cached.cache.registry import Registry
from cached.cache.resolver import Resolver
from cached.cache.scrub import Scrubber
from cached.cache.seeds import Seeds
from cached.cache.services import Services
from cached.cache.stagger import Stagger
from cached.cache.storage import Storage
from cached.cache.timed_pulls import TimedPulls
from cached.cache.trace import TraceFiles, TraceLog
from cached.cache.upkeep import Upkeep
from cached.cache.verified import VerifiedTimes
from cached.cache.verify import Verifier
from cached.cache.visibility import Visibility, new_policy
from cached.clock import Clock
from cached.config import Config, L1Config, origin_defaults
from cached.errors import CachedError, ConfigError, MoverError
from cached.fleet.kube import KubeApi, require_library
from cached.fleet.slots import Slots
from cached.index import Index, Store
from cached.leases import LeaseTable
from cached.levels.base import LocalLevel
from cached.levels.disk import DiskLevel
from cached.levels.shm import SHM_FOLDER, ShmLevel, huge_pages_allowed, mount_of
from cached.levels.striped import StripedDisk
from cached.metrics import Metrics
from cached.tracing import Tracer
from cached.transfer.chain import Chains
from cached.transfer.drives import Drives
from cached.transfer.fill import RetryPolicy
from cached.transfer.lanes import HedgeOutcome, Lanes
from cached.transfer.pool import MoverPool
from cached.transfer.process import StartMover, start_mover

_MAX_AUTO_MOVERS = 4
_MOVERS_END_S = 5.0
_MIN_START, _MAX_START = 4, 32
"""Ranges in flight from an origin that nothing is known of yet; see transfer.width."""


@dataclass(frozen=True, slots=True)
class Parts:
    """All of the engine, for ModelCache alone."""

    services: Services
    pool: MoverPool
    lanes: Lanes
    leases: LeaseTable
    evictor: Evictor
    loader: Loader
    pulls: Pulls
    contents: Contents
    recovery: Recovery
    upkeep: Upkeep
    timed_pulls: TimedPulls
    cold_starts: ColdStarts
    foresight: Foresight
    pool_keeper: PoolKeeper
    inspector: Inspector
    verifier: Verifier
    scrubber: Scrubber
    describer: Describer
    overviews: Overviews
    artifacts: Artifacts
    visibility: Visibility
    trace: TraceLog
    node_labels: NodeLabels | None

    def endings(self) -> dict[str, Callable[[], Awaitable[object]]]:
        """What is ended at the end, in this order, once nothing begins any more."""
        return {
            "trace": self.trace.write,
            "pulls": self.pulls.stop,
            "origins": self.services.chains.close,
            # Loads end when the movers do: what a mover still writes must not outlive the record of it.
            "loads": lambda: asyncio.gather(self.loader.stop(), self.pool.close(_MOVERS_END_S)),
            "segments": self.services.storage.collect,
            "pool": self.services.storage.give_back_pool,
        }


def instance_of(state_dir: str) -> str:
    """Names this daemon's segments: the same for the same state folder, so that a restart finds them."""
    return hashlib.sha256(os.path.realpath(state_dir).encode()).hexdigest()[:12]


def auto_movers() -> int:
    """How many movers there are at most where ``transfer.movers`` is 0."""
    return min(_MAX_AUTO_MOVERS, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class Outside:
    """What the engine reaches the machine by, beside its clock and the folders: a simulation gives it its own."""

    start_mover: StartMover = start_mover
    open_store: Callable[[Path], Store] = Store


_REAL = Outside()


def build_parts(
    config: Config, metrics: Metrics, clock: Clock, tracer: Tracer, *, version: str, outside: Outside = _REAL
) -> Parts:
    """Raises ConfigError for what only shows on this host."""
    instance = instance_of(config.daemon.state_dir)
    events = EventBus(clock)
    failures = Failures(events, metrics, clock)
    storage = _storage(config, instance)
    pool = new_movers(
        config,
        clock,
        on_death=partial(_mover_died, metrics, failures),
        on_lost=partial(_mover_lost, storage.disk, config.l2.folders),
        start=outside.start_mover,
    )
    lanes = new_lanes(config, clock, pool, on_hedge=lambda outcome: metrics.hedges.labels(outcome=outcome).inc())
    services = _services(config, metrics, clock, tracer, events, failures, storage, pool, lanes, outside.open_store)
    leases = LeaseTable()
    evictor = Evictor(services, leases, grace_s=config.daemon.restart_grace_s)
    loader = Loader(services, evictor, max_loads=config.transfer.max_concurrent_loads)
    evictor.join(loader)
    resolver = Resolver(services, origin_defaults(config), destination_of(config.artifacts), services.seeds)
    kube = _kube(config)
    pulls = Pulls(services, loader, resolver, _stagger(config, services, kube, instance))
    inspector = Inspector(services, pulls)
    view = services.view
    artifacts = Artifacts(services, resolver, loader, evictor, config.artifacts)
    cold_starts = ColdStarts(services.registry, metrics, events, clock)
    describer = Describer(
        services, loader, leases, view, Explainer(services, evictor), pulls, version=version, instance=instance
    )
    return Parts(
        services=services,
        pool=pool,
        lanes=lanes,
        leases=leases,
        evictor=evictor,
        loader=loader,
        pulls=pulls,
        contents=Contents(services, loader, pulls),
        recovery=Recovery(services, loader, pulls),
        upkeep=Upkeep(services, loader, pulls, evictor, cold_starts),
        timed_pulls=TimedPulls(services, pulls),
        cold_starts=cold_starts,
        foresight=Foresight(
            services, pulls, loader, evictor, mode=config.policy.predict, time_zone=config.policy.time_zone
        ),
        pool_keeper=PoolKeeper(services, lambda: bool(loader.loads)),
        inspector=inspector,
        verifier=Verifier(services, inspector),
        scrubber=Scrubber(services, inspector, config.scrub, lambda: bool(loader.loads)),
        describer=describer,
        overviews=Overviews(services, loader, leases, evictor, pulls, describer, cold_starts),
        artifacts=artifacts,
        visibility=Visibility(services, artifacts, new_policy(config.access), config.l1),
        trace=TraceLog(TraceFiles(Path(config.daemon.state_dir)), clock),
        node_labels=NodeLabels(services, kube, prefix=config.fleet.label_prefix)
        if kube is not None and config.fleet.node_labels
        else None,
    )


def _services(
    config: Config,
    metrics: Metrics,
    clock: Clock,
    tracer: Tracer,
    events: EventBus,
    failures: Failures,
    storage: Storage,
    pool: MoverPool,
    lanes: Lanes,
    open_store: Callable[[Path], Store],
) -> Services:
    state_dir = Path(config.daemon.state_dir)
    journal_dir = state_dir / "journals"
    journal_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    index = Index(state_dir / "index", open_store)
    registry = Registry(index, partial(_index_fault, failures), time_zone=config.policy.time_zone)
    registry.on_quarantine = partial(_quarantined, failures.degraded)
    chains = _chains(config, metrics, clock, lanes, pool, events, failures)
    services = Services(
        clock=clock,
        runner=chains,
        chains=chains,
        storage=storage,
        registry=registry,
        verified=VerifiedTimes(registry, clock),
        history=UseHistory(registry, clock),
        metrics=metrics,
        tracer=tracer,
        events=events,
        view=DirectoryView(Path(config.daemon.models_dir)),
        seeds=Seeds(config.l2.seed_dirs, events),
        retry=RetryPolicy(max_attempts=config.transfer.max_attempts, budget_s=config.transfer.retry_budget_s),
        width=max(pool.capacity, config.transfer.max_ranges) + config.transfer.threads_per_mover,
        write_slots=asyncio.Semaphore(max(1, pool.capacity // 4)),
        journal_dir=journal_dir,
        failures=failures,
    )
    if storage.disk is not None:
        storage.disk.on_hang = services.l2_hangs
    return services


def _mover_died(metrics: Metrics, failures: Failures, error: MoverError) -> None:
    metrics.mover_restarts.inc()
    failures.report("mover.died", error)


def _mover_lost(
    disk: DiskWork | None, folders: Sequence[str], paths: Collection[str], gone: asyncio.Future[None]
) -> None:
    """One that the kernel does not let end: if it was at work on L2, that hangs until it is ``gone``."""
    if disk is not None and any(path.startswith(f"{folder}/") for path in paths for folder in folders):
        disk.hang_until(gone)


def _index_fault(failures: Failures, failure: Exception | None) -> None:
    """The index could not be written, or (None) can be again."""
    if failure is None:
        failures.degraded.ended("index")
        return
    error = failure if isinstance(failure, CachedError) else failures.bug("index", failure)
    failures.degraded.began("index", f"the index cannot be written: {error.message}", error)


def _quarantined(degraded: Degraded, why: str) -> None:
    if why:
        degraded.began("quarantine", f"damaged, and cannot be fetched again: {why}")
    else:
        degraded.ended("quarantine")


def new_movers(
    config: Config,
    clock: Clock,
    *,
    on_death: Callable[[MoverError], None] = lambda _error: None,
    on_lost: Callable[[Collection[str], asyncio.Future[None]], None] = lambda _paths, _gone: None,
    start: StartMover = start_mover,
) -> MoverPool:
    """The movers as the settings want them; none is started yet. See MoverPool for where they may be used."""
    transfer = config.transfer
    return MoverPool(
        movers=transfer.movers or auto_movers(),
        threads=transfer.threads_per_mover,
        ranges=transfer.max_ranges,
        nice=transfer.nice,
        idle_timeout_s=transfer.idle_timeout_s,
        clock=clock,
        on_death=on_death,
        on_lost=on_lost,
        start=start,
    )


def new_lanes(
    config: Config,
    clock: Clock,
    pool: MoverPool,
    *,
    max_ranges: int = 0,
    on_hedge: Callable[[HedgeOutcome], None] = lambda _outcome: None,
) -> Lanes:
    """What runs jobs on these movers, with as many ranges of each origin in flight as pay; 0: as the settings say."""
    return Lanes(
        pool,
        clock,
        start=max(_MIN_START, min(2 * len(os.sched_getaffinity(0)), _MAX_START)),
        max_ranges=max_ranges or config.transfer.max_ranges,
        hedging=config.transfer.hedging,
        on_hedge=on_hedge,
    )


def _chains(
    config: Config,
    metrics: Metrics,
    clock: Clock,
    lanes: Lanes,
    pool: MoverPool,
    events: EventBus,
    failures: Failures,
) -> Chains:
    several = config.l2.enabled and len(config.l2.folders) > 1
    return Chains(
        Drives(lanes, config.l2.folders, limit=pool.capacity) if several else lanes,
        clock,
        on_bytes=metrics.delivered,
        on_failover=metrics.failed_over,
        events=events,
        report=failures.report,
    )


def _kube(config: Config) -> KubeApi | None:
    """Kubernetes' API, where a setting asks for it."""
    fleet = config.fleet
    if not (fleet.slots or fleet.node_labels):
        return None
    require_library("fleet.node_labels" if fleet.node_labels else "fleet.slots")
    return KubeApi(fleet.node_name, fleet.namespace)


def _stagger(config: Config, services: Services, kube: KubeApi | None, instance: str) -> Stagger:
    count = config.fleet.slots

    def on_away(why: str) -> None:
        if why:
            services.degraded.began("slots", f"slots of the fleet cannot be asked for: {why}")
        else:
            services.degraded.ended("slots")

    slots = None
    if kube is not None and count:
        slots = Slots(
            kube, services.clock, count=count, identity=f"{kube.node_name}.{instance}",
            on_outcome=lambda outcome: services.metrics.fleet_slots.labels(outcome=outcome).inc(), on_away=on_away,
        )  # fmt: skip
    return Stagger(
        services.clock, services.metrics, services.events, jitter_s=config.fleet.jitter_s, slots=slots, count=count
    )


def _storage(config: Config, instance: str) -> Storage:
    _check_memory(config.l1)
    l1 = ShmLevel(
        instance,
        folder=config.l1.path,
        mode=int(config.l1.segment_mode, 8),
        group=_group_id(config.l1.segment_group, "l1.segment_group"),
    )
    return Storage(config, l1, _disks(config) if config.l2.enabled else None)


def _disks(config: Config) -> LocalLevel:
    return StripedDisk([DiskLevel(Path(folder)) for folder in config.l2.folders])


def _check_memory(l1: L1Config) -> None:
    """The folder of L1 is memory, of the kind that is required."""
    mounts = Path("/proc/self/mounts").read_text()
    fs_type, _ = mount_of(mounts, os.path.realpath(l1.path))
    if l1.path != SHM_FOLDER and not (os.path.isdir(l1.path) and fs_type == "tmpfs"):
        what = f"is on {fs_type}" if os.path.isdir(l1.path) else "is no folder"
        raise ConfigError(
            f"l1.path = {l1.path!r} {what}: L1 is memory",
            hint=f"mount -t tmpfs -o size=50%,huge=advise,mode=0750,uid={os.geteuid()} tmpfs {l1.path}, or leave "
            "the setting out",
            key="l1.path",
            value=l1.path,
        )
    if l1.require_huge_pages and not huge_pages_allowed(mounts, os.path.realpath(l1.path)):
        raise ConfigError(
            f"l1.require_huge_pages is set, but the mount of {l1.path} does not give huge pages",
            hint=f"mount -o remount,huge=advise {l1.path}, or leave the setting out",
            key="l1.require_huge_pages",
            value="true",
        )


def _group_id(name: str, key: str) -> int | None:
    if not name:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigError(
            f"{key} names a group that does not exist: {name!r}", hint="create it: groupadd --system NAME",
            key=key, value=name,
        ) from error  # fmt: skip
