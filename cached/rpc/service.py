"""CacheService: each method converts, asks the engine and converts back. Errors and metrics are the interceptor's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from itertools import islice
from typing import Any

import grpc.aio

from cached.errors import InvalidRequestError
from cached.level import Level
from cached.rpc import coldstart, overview
from cached.rpc import converters as convert
from cached.rpc.engine import Engine
from cached.rpc.pacing import EventMerge, PullMerge, merge_attach, merge_verify, paced
from cached.rpc.requests import in_time
from cached.types import Client, ModelSummary
from cached_client._proto import cached_pb2 as pb
from cached_client._proto import cached_pb2_grpc

PROGRESS_INTERVAL_S = 0.1
RANGES_INTERVAL_S = 0.01
KEEP_ALIVE_S = 15.0
LEAVES_WITHIN_S = 5.0
"""Until who has given its lease back is expected to have cancelled the lease's stream, too."""
_REF_LIMIT = 4096
_CLIENT_NAME_LIMIT = 256
_TRACE_BATCH = 1000
_DATA_LIMIT_BYTES = 512 * 1024

_Context = grpc.aio.ServicerContext[Any, Any]


class CacheService(cached_pb2_grpc.CacheServiceServicer):
    """The methods of cached.v1. Streams end their work in the engine when they end, however that happens."""

    def __init__(
        self, engine: Callable[[], Engine], descriptor_socket: str, *, keep_alive_s: float = KEEP_ALIVE_S
    ) -> None:
        """``engine``: as whoever makes the current call sees it; raises PermissionDeniedError."""
        self._engine_seen = engine
        self._descriptor_socket = descriptor_socket
        self._keep_alive_s = keep_alive_s
        self._rows: dict[str, tuple[ModelSummary, pb.ModelSummary]] = {}

    @property
    def _engine(self) -> Engine:
        return self._engine_seen()

    async def Pull(self, request: pb.PullRequest, context: _Context) -> AsyncIterator[pb.PullResponse]:
        """Progress: every new phase, and at most ten times a second within one."""
        progress = self._engine.pull(
            _ref(request.ref),
            source=_bounded("source", request.source),
            tier=convert.tier_of(request.tier),
            level=convert.level_of(request.level) or Level.L1,
            wait=not request.no_wait,
            at_time_s=convert.time_of("at_time_s", request.at_time_s),
        )
        moments = paced(progress, PullMerge(), interval_s=PROGRESS_INTERVAL_S)
        async with aclosing(moments):
            async for moment in moments:
                if moment is not None:
                    yield pb.PullResponse(progress=convert.progress_message(moment))

    async def Attach(self, request: pb.AttachRequest, context: _Context) -> AsyncIterator[pb.AttachResponse]:
        """The lease: it is given back when this generator is closed, or by Detach, which usually comes before that."""
        attachment = await self._engine.attach(
            _ref(request.ref),
            source=_bounded("source", request.source),
            client=Client(name=request.client_name[:_CLIENT_NAME_LIMIT], pid=request.client_pid),
            resume=request.resume,
            only_if_resident=request.only_if_resident,
            keep_alive_s=convert.seconds_of("keep_alive_s", request.keep_alive_s),
            selection=convert.selection_of(request.selection) if request.HasField("selection") else None,
        )
        async with attachment, aclosing(attachment.events()) as events:
            if attachment.is_here:
                # A warm attach waits for nothing else: pacing, with a task of its own, would be some turns of the loop.
                yield convert.attach_message(await anext(events), self._descriptor_socket)
            # Each at its own pace: a thousand leases that were opened together are not to speak in one moment.
            idle_s = self._keep_alive_s * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
            moments = paced(events, merge_attach, interval_s=RANGES_INTERVAL_S, idle_s=idle_s)
            async with aclosing(moments):
                async for event in moments:
                    if event is None:
                        yield pb.AttachResponse(keep_alive=pb.KeepAlive())
                    else:
                        yield convert.attach_message(event, self._descriptor_socket)
        # What describes a status that meets its caller's cancellation gRPC never frees (grpc/grpc#43360).
        await asyncio.sleep(LEAVES_WITHIN_S)

    async def Detach(self, request: pb.DetachRequest, context: _Context) -> pb.DetachResponse:
        """Ends a lease early."""
        self._engine.detach(request.lease_id, request.token)
        return pb.DetachResponse()

    async def List(self, request: pb.ListRequest, context: _Context) -> pb.ListResponse:
        """All models. What the engine says again, as the same object, is not converted again."""
        before, self._rows = self._rows, {}
        for item in self._engine.list_models():
            row = before.get(item.name)
            self._rows[item.name] = row if row and row[0] is item else (item, convert.summary_message(item))
        return pb.ListResponse(models=[message for _, message in self._rows.values()])

    async def Describe(self, request: pb.DescribeRequest, context: _Context) -> pb.DescribeResponse:
        """One model."""
        return convert.detail_message(self._engine.describe(_ref(request.ref)))

    async def ListLeases(self, request: pb.ListLeasesRequest, context: _Context) -> pb.ListLeasesResponse:
        """All leases; their tokens stay secret."""
        return pb.ListLeasesResponse(leases=[convert.lease_message(item) for item in self._engine.list_leases()])

    async def SetTier(self, request: pb.SetTierRequest, context: _Context) -> pb.SetTierResponse:
        """Sets the operator's tier, or tells what that would lead to."""
        tier = convert.tier_of(request.tier)
        if tier is None:
            msg = "no tier was given"
            raise InvalidRequestError(msg, hint="use hot, warm, cold or auto", value=request.tier)
        if request.what_if:
            return convert.tier_change_message(self._engine.what_if(_ref(request.ref), tier))
        summary = await self._engine.set_tier(_ref(request.ref), tier)
        return pb.SetTierResponse(summary=convert.summary_message(summary))

    async def Pin(self, request: pb.PinRequest, context: _Context) -> pb.PinResponse:
        """Protects a model from eviction."""
        return pb.PinResponse(summary=convert.summary_message(await self._engine.pin(_ref(request.ref))))

    async def Unpin(self, request: pb.UnpinRequest, context: _Context) -> pb.UnpinResponse:
        """Ends the protection."""
        return pb.UnpinResponse(summary=convert.summary_message(await self._engine.unpin(_ref(request.ref))))

    async def Evict(self, request: pb.EvictRequest, context: _Context) -> pb.EvictResponse:
        """Takes a model out of one level, or of both."""
        freed = await self._engine.evict(_ref(request.ref), convert.level_of(request.level))
        return pb.EvictResponse(l1_freed_bytes=freed.l1_bytes, l2_freed_bytes=freed.l2_bytes)

    async def Remove(self, request: pb.RemoveRequest, context: _Context) -> pb.RemoveResponse:
        """Forgets a model."""
        freed = await self._engine.remove(_ref(request.ref))
        return pb.RemoveResponse(l1_freed_bytes=freed.l1_bytes, l2_freed_bytes=freed.l2_bytes)

    async def Verify(self, request: pb.VerifyRequest, context: _Context) -> AsyncIterator[pb.VerifyResponse]:
        """Every damage, and progress at most ten times a second."""
        ref = _ref(request.ref) if request.ref else None
        progress = self._engine.verify(ref, repair=request.repair)
        moments = paced(progress, merge_verify, interval_s=PROGRESS_INTERVAL_S)
        async with aclosing(moments):
            async for moment in moments:
                if moment is not None:
                    yield convert.verify_message(moment)

    async def Stats(self, request: pb.StatsRequest, context: _Context) -> pb.StatsResponse:
        """The daemon at a glance."""
        return convert.stats_message(self._engine.stats())

    async def Overview(self, request: pb.OverviewRequest, context: _Context) -> pb.OverviewResponse:
        """All that `cached top` shows."""
        return overview.overview_message(self._engine.overview(overview.limits_of(request)))

    async def Trace(self, request: pb.TraceRequest, context: _Context) -> AsyncIterator[pb.TraceResponse]:
        """The attaches that are remembered, in batches; they are read from a file beside the loop."""
        rows = self._engine.trace()
        while batch := await asyncio.to_thread(lambda: list(islice(rows, _TRACE_BATCH))):
            yield convert.trace_message(batch)

    async def ReportColdStart(
        self, request: pb.ReportColdStartRequest, context: _Context
    ) -> pb.ReportColdStartResponse:
        """Keeps what a worker tells of its start, once all of it was checked."""
        self._engine.report_cold_start(coldstart.cold_start_of(request.cold_start))
        return pb.ReportColdStartResponse()

    async def ListColdStarts(self, request: pb.ListColdStartsRequest, context: _Context) -> pb.ListColdStartsResponse:
        """The last starts of a model's workers."""
        starts = self._engine.cold_starts(_ref(request.ref), request.limit)
        return pb.ListColdStartsResponse(cold_starts=[coldstart.cold_start_message(item) for item in starts])

    async def Watch(self, request: pb.WatchRequest, context: _Context) -> AsyncIterator[pb.WatchResponse]:
        """Events as they happen; a reader that is too slow is told how many it missed."""
        happened = paced(self._engine.watch(replay=request.replay), EventMerge(), interval_s=0)
        async with aclosing(happened):
            async for event in happened:
                if event is not None:
                    yield pb.WatchResponse(event=convert.event_message(event))

    async def FindArtifact(self, request: pb.FindArtifactRequest, context: _Context) -> pb.FindArtifactResponse:
        """What there is for a key."""
        found = await self._engine.find_artifact(dict(request.key), local_only=request.local_only)
        return convert.found_message(found, self._descriptor_socket)

    async def PutArtifact(
        self, request_iterator: AsyncIterator[pb.PutArtifactRequest], context: _Context
    ) -> pb.PutArtifactResponse:
        """The offer, then the bytes; what is not wanted is not read."""
        first = await in_time(anext(aiter(request_iterator), None))
        if first is None or first.WhichOneof("part") != "offer":
            raise InvalidRequestError("the first message has no offer", hint="send the offer, then the archive's bytes")
        data = _data_of(request_iterator)
        async with aclosing(data):
            outcome, artifact = await self._engine.put_artifact(convert.offer_of(first.offer), data)
        return convert.put_message(outcome, artifact)

    async def ListArtifacts(self, request: pb.ListArtifactsRequest, context: _Context) -> pb.ListArtifactsResponse:
        """The artifacts of this host, and of the destination where asked for."""
        found = await self._engine.list_artifacts(remote=request.remote)
        return pb.ListArtifactsResponse(artifacts=map(convert.artifact_message, found))


async def _data_of(messages: AsyncIterator[pb.PutArtifactRequest]) -> AsyncGenerator[bytes]:
    async for message in messages:
        if message.WhichOneof("part") != "data" or not 0 < len(message.data) <= _DATA_LIMIT_BYTES:
            raise InvalidRequestError(
                "a message of an artifact has no bytes, or too many", hint=f"send 1 to {_DATA_LIMIT_BYTES} at a time"
            )
        yield message.data


def _ref(value: str) -> str:
    if not value.strip():
        msg = "no model was named"
        raise InvalidRequestError(msg, hint="give a NAME, NAME@REVISION or a URI", value=value)
    return _bounded("reference", value)


def _bounded(what: str, value: str) -> str:
    if len(value) > _REF_LIMIT:
        msg = f"the {what} has {len(value)} characters; at most {_REF_LIMIT} are accepted"
        raise InvalidRequestError(msg, value=value[:64])
    return value
