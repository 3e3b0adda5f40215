"""A small engine of values for the tests of the edges, and a server around it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc.aio

from cached.cache.events import EventBus
from cached.cache.failures import Failures
from cached.clock import SystemClock
from cached.errors import CachedError, NotFoundError
from cached.level import Level
from cached.metrics import Metrics
from cached.overview import Holding, LevelUse, Limits, Move, MoveKind, MovePhase, Overview, Problem
from cached.rpc.server import RpcServer
from cached.types import (
    Attached,
    AttachedFile,
    AttachEvent,
    CheckedBy,
    Client,
    ColdStart,
    ColdStartPhase,
    Complete,
    Event,
    FileDetail,
    Freed,
    LeaseInfo,
    LevelStats,
    ModelDetail,
    ModelSummary,
    Opened,
    Peer,
    PlaceDetail,
    PlannedEviction,
    PullProgress,
    RevisionState,
    ScrubStats,
    Selection,
    Stats,
    Tier,
    TierChange,
    VerifyProgress,
)  # fmt: skip
from cached_client._proto import cached_pb2_grpc

SUMMARY = ModelSummary(
    name="tiny", revision="r1", state=RevisionState.READY, tier=Tier.WARM, tier_from="catalog", pinned=True,
    size_bytes=100, l1_bytes=90, l2_bytes=80, file_count=2, lease_count=1, source="s3://b/tiny", last_used_time_s=5.5,
    checked_by=CheckedBy.ORIGIN_CHECKSUM, progress=0.5, priority=3,
    worth_s=200.0, transient=True, tenant="red", base="tiny-base",
)  # fmt: skip
LEASE = LeaseInfo(
    "l1", "tiny", "r1", Client("worker", 12), Peer(13, 14, 15, "python3", "pod 1c7f9e0b"), 7.5, True, 100
)  # fmt: skip
DETAIL = ModelDetail(
    summary=SUMMARY,
    files=(FileDetail("a.safetensors", 99, "ab" * 32, True, True, ("other",), 1, CheckedBy.FIRST_SEEN),),
    revisions=("r1", "r0"), path="/models/tiny", leases=(LEASE,), notes=("skipped *.bin",), last_error="boom",
    places=(
        PlaceDetail(Level.L1, 90, 200.0, 2.5, 80.0, "90 B in l1: it spares 3m20s", ("other", "last"), 1e9),
        PlaceDetail(Level.L2, 80, 100.0, 2.5, 40.0, "80 B in l2: it spares 1m40s", ("other",), 1e9),
    ),
    schedule=("mon-fri 08:00-20:00",), schedule_change_time_s=4102444800.0, pull_times_s=(4102444801.0,),
)  # fmt: skip
STATS = Stats(
    levels=(LevelStats(Level.L1, 100, 60, 10, 5, 7, 3, "configured", 11, 12, 80, 7200.0),),
    counters={"cached_hits_total": 2.0},
    lease_count=2, model_count=3, active_load_count=1, mover_count=4, uptime_s=1.5, version="1",
    degraded=("l2 is read-only",), instance="ab", scrub=ScrubStats(64_000_000, 1000, 250, waiting=True),
)  # fmt: skip
TIER_CHANGE = TierChange(
    SUMMARY, (PlannedEviction(Level.L1, "other", "r9", 50, "worth least", "it was worth least for each byte"),), 40
)
COLD_START = ColdStart(
    "tiny", "ab12", "worker.py", 1000.5, 4.0,
    (
        ColdStartPhase("download", 0.0, 3.0), ColdStartPhase("imports", 0.0, 2.0), ColdStartPhase("warmup", 3.0, 4.0),
        ColdStartPhase("b8.s16", 3.0, 3.5, parent=2, after="download", running=True, failed=True),
    ),
    {"from_level": "l3", "engine": "mine"}, 1010.0,
)  # fmt: skip
OVERVIEW = Overview(
    time_s=2000.5,
    stats=STATS,
    uses=(LevelUse(Level.L1, {**dict.fromkeys(Holding, 3), Holding.FREE: 30}, 7),),
    models=(SUMMARY,),
    model_count=3,
    moves=(
        Move(
            MoveKind.PULL, MovePhase.MOVING, "tiny", "r2", Level.L1, "s3://b/tiny", 1000, 400, 900, 300, 50.0, 8.5,
            ("vllm (pid 7)",), 2, partial=True,
        ),
    ),
    move_count=2,
    leases=(LEASE,),
    events=(Event(1999.0, "evicted", "other", "r1", "other left l1: it is cold", {"level": "l1"}),),
    cold_starts=(COLD_START,),
    problems=(Problem("l2", "L2 could not be written"), Problem("model", "s3://b/x: 403", "x")),
)  # fmt: skip
NOBODY = Client()
COMPLETE = Complete(Level.L2, 1, 2, 3, 0.5, CheckedBy.CATALOG_SHA256)
OPENED = Opened("l1", "secret", "tiny", "r1", (AttachedFile(0, "a.safetensors", 99, "ab" * 32),))


class FakeAttachment:
    """Gives out what the test puts into ``queue`` until None comes."""

    lease_id = "l1"
    is_here = False

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    async def events(self) -> AsyncGenerator[AttachEvent]:
        while (event := await self._engine.attach_events.get()) is not None:
            if isinstance(event, CachedError):
                raise event
            yield event

    async def __aenter__(self) -> Self:
        self._engine.held += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        self._engine.held -= 1
        self._engine.released.set()


@dataclass
class FakeEngine:
    """Answers with constants; ``calls`` records what was asked."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    error: Exception | None = None
    held: int = 0
    released: asyncio.Event = field(default_factory=asyncio.Event)
    attach_events: asyncio.Queue[AttachEvent | CachedError | None] = field(default_factory=asyncio.Queue)
    progress: list[PullProgress] = field(default_factory=list)
    verify_progress: list[VerifyProgress] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    attached: list[Attached] = field(default_factory=list)
    started: list[ColdStart] = field(default_factory=list)
    keeps_watching: bool = False
    """Whether a watch goes on after ``events``, as a real one does."""
    files: list[Path] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)
    failures: Failures = field(default_factory=lambda: Failures(EventBus(SystemClock()), Metrics(), SystemClock()))

    def _called(self, *call: object) -> None:
        self.calls.append(call)
        if self.error is not None:
            raise self.error

    async def pull(
        self,
        ref: str,
        *,
        source: str = "",
        tier: Tier | None = None,
        level: Level = Level.L1,
        wait: bool = True,
        at_time_s: float = 0.0,
    ) -> AsyncIterator[PullProgress]:
        self._called("pull", ref, source, tier, level, wait, *([at_time_s] if at_time_s else []))
        for item in self.progress:
            yield item

    async def attach(
        self,
        ref: str,
        *,
        source: str = "",
        client: Client = NOBODY,
        resume: bool = False,
        only_if_resident: bool = False,
        keep_alive_s: float = 0.0,
        selection: Selection | None = None,
    ) -> FakeAttachment:
        kept = [keep_alive_s] if keep_alive_s else []
        chosen = [selection] if selection else []
        self._called("attach", ref, source, client, resume, only_if_resident, *kept, *chosen)
        return FakeAttachment(self)

    def detach(self, lease_id: str, token: str) -> None:
        self._called("detach", lease_id, token)
        self.attach_events.put_nowait(None)

    @property
    def visibility(self) -> FakeEngine:
        return self

    def is_known(self, name: str) -> bool:
        return name in self.names()

    def names(self) -> tuple[str, ...]:
        return ("tiny", "other")

    def require_running(self) -> None:
        self._called("require_running")

    def leased_name(self, token: str) -> str:
        self._called("leased_name", token)
        return "tiny"

    def loads(self) -> tuple[PullProgress, ...]:
        return ()

    def list_models(self) -> tuple[ModelSummary, ...]:
        self._called("list_models")
        return (SUMMARY,)

    def describe(self, ref: str) -> ModelDetail:
        self._called("describe", ref)
        return DETAIL

    def list_leases(self) -> tuple[LeaseInfo, ...]:
        self._called("list_leases")
        return (LEASE,)

    async def set_tier(self, ref: str, tier: Tier) -> ModelSummary:
        self._called("set_tier", ref, tier)
        return SUMMARY

    def what_if(self, ref: str, tier: Tier) -> TierChange:
        self._called("what_if", ref, tier)
        return TIER_CHANGE

    async def pin(self, ref: str) -> ModelSummary:
        self._called("pin", ref)
        return SUMMARY

    async def unpin(self, ref: str) -> ModelSummary:
        self._called("unpin", ref)
        return SUMMARY

    async def evict(self, ref: str, level: Level | None) -> Freed:
        self._called("evict", ref, level)
        return Freed(1, 2)

    async def remove(self, ref: str) -> Freed:
        self._called("remove", ref)
        return Freed(3, 4)

    async def verify(self, ref: str | None, *, repair: bool) -> AsyncIterator[VerifyProgress]:
        self._called("verify", ref, repair)
        for item in self.verify_progress:
            yield item

    def stats(self) -> Stats:
        self._called("stats")
        return STATS

    def overview(self, limits: Limits, sees: Callable[[str], bool] | None = None) -> Overview:
        self._called("overview", limits)
        return OVERVIEW

    def trace(self) -> Iterator[Attached]:
        self._called("trace")
        return iter(self.attached)

    def report_cold_start(self, start: ColdStart) -> None:
        self._called("report_cold_start", start)

    def cold_starts(self, ref: str, limit: int) -> tuple[ColdStart, ...]:
        self._called("cold_starts", ref, limit)
        return tuple(self.started)[-limit:]

    async def watch(self, *, replay: bool) -> AsyncIterator[Event]:
        self._called("watch", replay)
        for item in self.events:
            yield item
        if self.keeps_watching:
            await asyncio.Event().wait()

    def open_descriptors(self, token: str, file_indices: Sequence[int], peer: Peer) -> list[int]:
        self._called("open_descriptors", token, list(file_indices), peer)
        if token != OPENED.token:
            msg = "no such lease"
            raise NotFoundError(msg, hint="attach again")
        descriptors = [os.open(self.files[index], os.O_RDONLY | os.O_CLOEXEC) for index in file_indices]
        self.opened += descriptors
        return descriptors


@dataclass
class Served:
    """A running server and what surrounds it."""

    engine: FakeEngine
    metrics: Metrics
    server: RpcServer
    channel: grpc.aio.Channel

    @property
    def stub(self) -> cached_pb2_grpc.CacheServiceStub[grpc.aio.Channel]:
        """Calls the server."""
        return cached_pb2_grpc.CacheServiceStub(self.channel)


@asynccontextmanager
async def served(folder: Path, *, serving: bool = True, reflect: bool = False) -> AsyncIterator[Served]:
    """A server on ``folder``/cached.sock around a FakeEngine."""
    engine, metrics = FakeEngine(), Metrics()
    server = RpcServer(engine, metrics, str(folder / "cached.sock"), mode=0o600, reflect=reflect)
    await server.start()
    if serving:
        await server.serving()
    try:
        async with grpc.aio.insecure_channel(f"unix:{server.socket}") as channel:
            yield Served(engine, metrics, server, channel)
    finally:
        await server.stop(0)
