"""The bound of all calls together: it is told, calls that never send a request count, and health answers beyond it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from cached_client._proto import cached_pb2 as pb
from tests.unit.rpc_support import Served, served
from tests.unit.test_rpc_service import info_of

MOST = 3
_SERVICE = "/cached.v1.CacheService"
_HEALTH = "/grpc.health.v1.Health"


@pytest.fixture(autouse=True)
def _few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cached.rpc.server._MOST_CALLS", MOST)


def used(it: Served) -> str:
    text = it.metrics.expose("")[0].decode()
    return next(line for line in text.splitlines() if line.startswith('cached_limit_used_ratio{limit="all_calls"}'))


def counted(it: Served) -> dict[str, float]:
    return it.engine.failures._metrics.counters()


async def health_of(it: Served) -> int:
    stub: Any = health_pb2_grpc.HealthStub(it.channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(), timeout=20)).status)


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


async def unasked(it: Served, path: str, count: int = 1) -> list[asyncio.Task[Any]]:
    """Calls that begin and send no request."""
    calls: list[Any] = [it.channel.stream_unary(path)(never()) for _ in range(count)]
    return [asyncio.create_task(_outcome(call)) for call in calls]


async def _outcome(call: Any) -> grpc.StatusCode:
    return cast("grpc.StatusCode", await call.code())


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.01)


async def refusal(it: Served) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await it.stub.List(pb.ListRequest(), timeout=20)
    return caught.value


async def check_full(it: Served) -> None:
    """All calls are taken: the next one is told so, and health answers."""

    async def full() -> bool:
        return used(it).endswith(" 1.0")

    await until(full)
    error = await refusal(it)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    info = info_of(error)
    assert (info.reason, info.metadata["limit"], info.metadata["allowed"]) == ("LIMIT_EXCEEDED", "all calls", str(MOST))
    assert info.metadata["setting"] == "limits.calls_per_uid"
    assert counted(it)['cached_failures_total{reason="LIMIT_EXCEEDED"}'] >= 1
    assert await health_of(it) == health_pb2.HealthCheckResponse.SERVING


async def test_the_bound_of_all_calls_is_told_and_health_answers_beyond_it(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        it.engine.keeps_watching = True
        streams = [it.stub.Watch(pb.WatchRequest()) for _ in range(MOST)]
        await check_full(it)
        for stream in streams:
            stream.cancel()

        async def again() -> bool:
            with suppress(grpc.aio.AioRpcError):
                await it.stub.List(pb.ListRequest(), timeout=20)
                return True
            return False

        await until(again)


async def test_calls_that_never_send_their_request_count(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        calls = await unasked(it, f"{_SERVICE}/List", 2) + await unasked(it, f"{_SERVICE}/PutArtifact")
        await check_full(it)
        for call in calls:
            call.cancel()


async def test_and_end_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cached.rpc.requests.FIRST_S", 0.05)
    async with served(tmp_path) as it:
        for method in ("List", "Attach", "PutArtifact"):
            (call,) = await unasked(it, f"{_SERVICE}/{method}")
            assert await call is grpc.StatusCode.DEADLINE_EXCEEDED
        assert used(it).endswith(" 0.0")
        assert counted(it)['cached_failures_total{reason="TIMED_OUT"}'] == 3


async def test_a_health_check_without_a_request_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cached.rpc.interceptor._HEALTH_S", 0.05)
    async with served(tmp_path) as it:
        (call,) = await unasked(it, f"{_HEALTH}/Check")
        assert await call is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await health_of(it) == health_pb2.HealthCheckResponse.SERVING


async def test_health_cannot_be_watched(tmp_path: Path) -> None:
    async with served(tmp_path) as it:
        stub: Any = health_pb2_grpc.HealthStub(it.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(health_pb2.HealthCheckRequest(), timeout=20).read()
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_counts_as_a_stream(tmp_path: Path) -> None:
    async with served(tmp_path, reflect=True) as it:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(cast("Any", it.channel))
        calls = [stub.ServerReflectionInfo(never()) for _ in range(MOST)]
        await check_full(it)
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("message", [b"\xff\xff garbage", b""])
async def test_a_request_that_cannot_be_read_is_the_callers_affair(tmp_path: Path, message: bytes) -> None:
    async with served(tmp_path) as it:
        call: Any = it.channel.stream_unary(f"{_SERVICE}/Describe")(iter([message] if message else []))
        assert await _outcome(call) is grpc.StatusCode.INVALID_ARGUMENT
        assert not counted(it)['cached_failures_total{reason="INTERNAL"}']
