"""CacheService over a real gRPC server and socket."""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cached.access import Caller
from cached.errors import CachedError, ConfigError, NoRoomError, PermissionDeniedError
from cached.level import Level
from cached.metrics import Metrics
from cached.rpc import service
from cached.rpc.callers import Callers
from cached.rpc.server import SERVICE, RpcServer
from cached.rpc.service import CacheService
from cached.types import (
    Attached,
    AttachEvent,
    ByteRange,
    Client,
    Damage,
    Event,
    PullPhase,
    PullProgress,
    RangesReady,
    Tier,
    VerifyProgress,
)
from cached_client._proto import cached_pb2 as pb
from tests.unit.rpc_support import COMPLETE, OPENED, FakeEngine, Served, served


def info_of(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo:
    found = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(found["grpc-status-details-bin"])
    assert status.code == error.code().value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return info


async def test_unary_methods_pass_their_arguments_and_answers(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        assert (await it.stub.List(pb.ListRequest())).models[0].name == "tiny"
        assert (await it.stub.Describe(pb.DescribeRequest(ref="tiny"))).revisions == ["r1", "r0"]
        assert (await it.stub.ListLeases(pb.ListLeasesRequest())).leases[0].peer_uid == 14
        await it.stub.SetTier(pb.SetTierRequest(ref="tiny", tier=pb.TIER_HOT))
        assert (await it.stub.Pin(pb.PinRequest(ref="tiny"))).summary.pinned
        await it.stub.Unpin(pb.UnpinRequest(ref="tiny"))
        assert (await it.stub.Evict(pb.EvictRequest(ref="tiny"))).l2_freed_bytes == 2
        await it.stub.Evict(pb.EvictRequest(ref="tiny", level=pb.LEVEL_L1))
        assert (await it.stub.Remove(pb.RemoveRequest(ref="tiny"))).l1_freed_bytes == 3
        assert (await it.stub.Stats(pb.StatsRequest())).levels[0].pool_bytes == 7
        await it.stub.Detach(pb.DetachRequest(lease_id="l1", token="t"))
        assert it.engine.calls == [
            ("list_models",), ("describe", "tiny"), ("list_leases",), ("set_tier", "tiny", Tier.HOT), ("pin", "tiny"),
            ("unpin", "tiny"), ("evict", "tiny", None), ("evict", "tiny", Level.L1), ("remove", "tiny"), ("stats",),
            ("detach", "l1", "t"),
        ]  # fmt: skip
        assert it.metrics.counters()['cached_rpc_total{method="Evict",code="OK"}'] == 2


async def test_what_if_asks_and_changes_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        answer = await it.stub.SetTier(pb.SetTierRequest(ref="tiny", tier=pb.TIER_HOT, what_if=True))
        assert it.engine.calls == [("what_if", "tiny", Tier.HOT)]
        assert (answer.evictions[0].name, answer.evictions[0].reason, answer.loaded_bytes) == (
            "other",
            "worth least",
            40,
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.SetTier(pb.SetTierRequest(ref="tiny", what_if=True))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_times_are_passed_and_nonsense_is_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.progress = [PullProgress(PullPhase.SCHEDULED, "tiny")]
        pulls = [response.progress async for response in it.stub.Pull(pb.PullRequest(ref="tiny", at_time_s=2e9))]
        assert [progress.phase for progress in pulls] == [pb.PullProgress.PHASE_SCHEDULED]
        attach = it.stub.Attach(pb.AttachRequest(ref="tiny", keep_alive_s=90.0))
        it.engine.attach_events.put_nowait(OPENED)
        await attach.read()
        attach.cancel()
        assert [call[-1] for call in it.engine.calls] == [2e9, 90.0]
        for nonsense in (float("nan"), -1.0):
            for call in (
                it.stub.Pull(pb.PullRequest(ref="tiny", at_time_s=nonsense)),
                it.stub.Attach(pb.AttachRequest(ref="tiny", keep_alive_s=nonsense)),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call.read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert info_of(caught.value).reason == "INVALID_REQUEST"
        assert len(it.engine.calls) == 2


async def test_a_trace_comes_in_batches(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.attached = [Attached(float(at), "tiny", 100, 0.5) for at in range(2500)]
        answers = [response async for response in it.stub.Trace(pb.TraceRequest())]
        assert [len(answer.rows) for answer in answers] == [1000, 1000, 500]
        assert [row.time_s for answer in answers for row in answer.rows] == [float(at) for at in range(2500)]
        it.engine.attached = []
        assert [response async for response in it.stub.Trace(pb.TraceRequest())] == []


async def test_pull_passes_every_phase_and_thins_out_the_rest(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.progress = [
            PullProgress(PullPhase.RESOLVING, "tiny"),
            *(PullProgress(PullPhase.TRANSFERRING, "tiny", done_bytes=done) for done in range(500)),
            PullProgress(PullPhase.READY, "tiny", done_bytes=500),
        ]
        request = pb.PullRequest(ref="tiny", source="s3://b/x", tier=pb.TIER_COLD, level=pb.LEVEL_L2, no_wait=True)
        got = [response.progress async for response in it.stub.Pull(request)]
        phases = list(dict.fromkeys(item.phase for item in got))
        kinds = pb.PullProgress
        assert phases == [kinds.PHASE_RESOLVING, kinds.PHASE_TRANSFERRING, kinds.PHASE_READY]
        assert len(got) < 20
        assert got[-1].done_bytes == 500
        assert it.engine.calls == [("pull", "tiny", "s3://b/x", Tier.COLD, Level.L2, False)]


async def test_attach_opens_announces_and_gives_the_lease_back_when_the_client_goes(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        request = pb.AttachRequest(ref="tiny", client_name="x" * 999, client_pid=3, only_if_resident=True)
        call = it.stub.Attach(request)
        ranges_ready = [RangesReady((ByteRange(0, at, 10),)) for at in range(0, 100, 10)]
        events: list[AttachEvent] = [OPENED, *ranges_ready, COMPLETE]
        for event in events:
            it.engine.attach_events.put_nowait(event)
        got: list[pb.AttachResponse] = []
        while not got or got[-1].WhichOneof("event") != "complete":
            got.append(cast("pb.AttachResponse", await call.read()))
        assert got[0].opened.token == "secret"
        assert got[0].opened.descriptor_socket == str(tmp_path / "cached-fd.sock")
        assert not got[0].opened.HasField("complete")
        ranges = [item for message in got for item in message.ranges_ready.ranges]
        assert sum(item.length_bytes for item in ranges) == 100
        assert len(ranges) < 10
        assert it.engine.calls == [("attach", "tiny", "", Client("x" * 256, 3), False, True)]
        assert it.engine.held == 1
        call.cancel()
        await asyncio.wait_for(it.engine.released.wait(), 10)
        assert it.engine.held == 0


async def test_a_stream_is_told_that_the_daemon_stops(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        attach = it.stub.Attach(pb.AttachRequest(ref="tiny"))
        it.engine.attach_events.put_nowait(OPENED)
        await attach.read()
        await it.server.draining()
        assert not attach.done(), "draining ends no lease"
        reading = asyncio.ensure_future(attach.read())
        await it.server.stop(20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reading
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert info_of(caught.value).metadata["phase"] == "stopping"
        assert it.engine.held == 0
        assert it.metrics.counters()['cached_rpc_total{method="Attach",code="UNAVAILABLE"}'] == 1


async def test_an_idle_attach_is_kept_alive(tmp_path: Path) -> None:
    engine = FakeEngine()
    service = CacheService(lambda: cast("Any", engine), "", keep_alive_s=0.01)
    engine.attach_events.put_nowait(OPENED)
    stream = service.Attach(pb.AttachRequest(ref="tiny"), cast("Any", None))
    async with aclosing(cast("Any", stream)):
        kinds = [(await anext(stream)).WhichOneof("event") for _ in range(3)]
        assert kinds == ["opened", "keep_alive", "keep_alive"]
    assert engine.held == 0


async def detached(it: Served) -> Any:
    """A lease's stream once the lease was given back."""
    call = it.stub.Attach(pb.AttachRequest(ref="tiny"))
    it.engine.attach_events.put_nowait(OPENED)
    await call.read()
    await it.stub.Detach(pb.DetachRequest(lease_id="l1", token="secret"))
    async with asyncio.timeout(20):
        await it.engine.released.wait()
    return call


async def test_detach_ends_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LEAVES_WITHIN_S", 0.05)
    async with served(tmp_path) as it:
        call = await detached(it)
        assert await call.read() is grpc.aio.EOF
        assert it.engine.held == 0


async def test_who_detaches_cancels_the_stream_before_a_status_is_on_its_way(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        for _ in range(20):
            (await detached(it)).cancel()
            it.engine.released.clear()
        name = 'cached_rpc_total{method="Attach",code="CANCELLED"}'
        async with asyncio.timeout(20):
            while it.metrics.counters().get(name) != 20:
                await asyncio.sleep(0.01)


async def test_calls_of_a_connection_that_has_ended_are_no_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    def gone(callers: Callers, peer: str) -> Caller:
        asked.set()
        raise PermissionDeniedError("nobody knows who makes this call")

    async with served(tmp_path) as it:
        monkeypatch.setattr(Callers, "of", gone)
        call = it.stub.Attach(pb.AttachRequest(ref="tiny"))
        async with asyncio.timeout(20):
            await asked.wait()
            call.cancel()
            while not it.metrics.counters().get('cached_rpc_total{method="Attach",code="CANCELLED"}'):
                await asyncio.sleep(0.01)
        assert not it.engine.failures._events.recent
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.List(pb.ListRequest())
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert [event.kind for event in it.engine.failures._events.recent] == ["rpc.refused"]


async def test_a_load_that_fails_ends_the_attach_with_its_error(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        call = it.stub.Attach(pb.AttachRequest(ref="tiny"))
        it.engine.attach_events.put_nowait(OPENED)
        it.engine.attach_events.put_nowait(NoRoomError("no room", level="l1"))
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert it.engine.held == 0


async def test_verify_reports_every_damage(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        damage = [Damage("tiny", "r1", "a", "ab", Level.L2, at, at * 16, 16, False) for at in range(5)]
        it.engine.verify_progress = [
            *(VerifyProgress(10, 1, item, False, 1, 0) for item in damage), VerifyProgress(10, 10, None, True, 5, 0),
        ]  # fmt: skip
        got = [response async for response in it.stub.Verify(pb.VerifyRequest(repair=True))]
        assert [item.damage.chunk_index for item in got if item.HasField("damage")] == [0, 1, 2, 3, 4]
        assert got[-1].finished
        assert it.engine.calls == [("verify", None, True)]


async def test_watch_passes_events(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.events = [Event(1.0, "evicted", "tiny", message="a\udcff", fields={"level": "l1"})]
        got = [response.event async for response in it.stub.Watch(pb.WatchRequest(replay=True))]
        assert [(item.kind, item.name, item.fields["level"]) for item in got] == [("evicted", "tiny", "l1")]
        assert it.engine.calls == [("watch", True)]


@pytest.mark.parametrize(
    ("method", "request_message"),
    [
        ("SetTier", pb.SetTierRequest(ref="x")),
        ("SetTier", pb.SetTierRequest(ref="x", tier=cast("Any", 99))),
        ("Evict", pb.EvictRequest(ref="x", level=pb.LEVEL_L3)),
        ("Evict", pb.EvictRequest(ref=" ")),
        ("Describe", pb.DescribeRequest(ref="x" * 5000)),
    ],
)
async def test_what_makes_no_sense_is_refused_before_the_engine(
    tmp_path: Path, method: str, request_message: object
) -> None:
    async with served(tmp_path) as it:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(it.stub, method)(request_message)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert info_of(caught.value).reason == "INVALID_REQUEST"
        assert it.engine.calls == []


async def test_an_error_travels_with_reason_fields_and_hint(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.error = NoRoomError(
            "L1 is full", hint="evict something", level="l1", needed_bytes=5, holders="x" * 9000
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.Pin(pb.PinRequest(ref="tiny"))
        assert caught.value.details() == "L1 is full"
        info = info_of(caught.value)
        assert (info.domain, info.reason) == ("cached.v1", "NO_ROOM")
        assert (info.metadata["hint"], info.metadata["needed_bytes"]) == ("evict something", "5")
        assert info.metadata["holders"].endswith("…")
    # Counted once the answer is out, so for sure when the server has ended.
    assert it.metrics.counters()['cached_rpc_total{method="Pin",code="RESOURCE_EXHAUSTED"}'] == 1


async def test_an_unforeseen_exception_leaks_nothing(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.error = RuntimeError("secret internals")
        # Each begins when it is awaited: gRPC may hang on the first read of a stream that has failed long before.
        for ask in (lambda: it.stub.List(pb.ListRequest()), lambda: it.stub.Pull(pb.PullRequest(ref="x")).read()):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask()
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in str(caught.value.details())
            assert info_of(caught.value).reason == CachedError.reason


async def refused(it: Served) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await it.stub.Attach(pb.AttachRequest(ref="tiny")).read()
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


async def test_the_gate_and_health_follow_the_daemon(tmp_path: Path) -> None:
    async with served(tmp_path, serving=False) as it:
        health: Any = health_pb2_grpc.HealthStub(it.channel)
        kinds = health_pb2.HealthCheckResponse

        async def status(name: str) -> int:
            return int((await health.Check(health_pb2.HealthCheckRequest(service=name))).status)

        assert await status("") == await status(SERVICE) == kinds.NOT_SERVING
        assert "starting" in await refused(it)
        await it.server.serving()
        assert await status("") == await status(SERVICE) == kinds.SERVING
        await it.stub.List(pb.ListRequest())
        await it.server.draining()
        assert await status(SERVICE) == kinds.NOT_SERVING
        assert "draining" in await refused(it)
        await it.stub.List(pb.ListRequest())


async def test_the_socket_has_its_mode_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        assert stat.S_IMODE(os.stat(it.server.socket).st_mode) == 0o600
        os.link(it.server.socket, tmp_path / "kept")
    os.rename(tmp_path / "kept", tmp_path / "cached.sock")
    async with served(tmp_path) as it:
        await it.stub.List(pb.ListRequest())


async def test_a_file_in_the_socket_s_place_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cached.sock"
    path.write_text("mine")
    server = RpcServer(FakeEngine(), Metrics(), str(path), mode=0o600)
    with pytest.raises(ConfigError, match="not a socket"):
        await server.start()
    await server.stop(0)
    assert path.read_text() == "mine"


async def test_grpc_has_one_task_that_waits_for_calls_and_not_one_for_each_method(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        await it.stub.List(pb.ListRequest())
        waiting = [task for task in asyncio.all_tasks() if "AioServer" in repr(task)]
        assert 1 <= len(waiting) <= 3, waiting


async def test_reflection_only_where_asked_for(tmp_path: Path) -> None:
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    for reflect in (False, True):
        async with served(tmp_path, reflect=reflect) as it:
            stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", it.channel))
            call = stub.ServerReflectionInfo(
                iter([cast("Any", reflection_pb2).ServerReflectionRequest(list_services="")])
            )
            if not reflect:
                with pytest.raises(grpc.aio.AioRpcError):
                    await call.read()
                continue
            answer = await call.read()
            assert SERVICE in {item.name for item in answer.list_services_response.service}


async def test_an_error_that_comes_while_the_stream_is_being_taken_up_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cached.rpc.interceptor._SILENT_S", 0.0)
    async with served(tmp_path) as it:
        for _ in range(20):
            call = it.stub.Attach(pb.AttachRequest(ref="tiny"), timeout=20)
            it.engine.attach_events.put_nowait(NoRoomError("no room", level="l1"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
