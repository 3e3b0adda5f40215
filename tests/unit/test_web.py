"""The HTTP pages over a real listener."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from cached.errors import ConfigError
from cached.metrics import Metrics
from cached.types import ModelSummary
from cached.web.http import HttpServer, Views
from tests.unit.rpc_support import STATS, SUMMARY


class Place:
    def __init__(self) -> None:
        self.reasons: tuple[str, ...] = ()
        self.models: tuple[ModelSummary, ...] = (SUMMARY,)
        self.metrics = Metrics("1.2")
        views = Views(self.metrics, lambda: self.reasons, lambda: STATS, lambda: self.models)
        self.server = HttpServer("127.0.0.1:0", views)

    async def get(self, path: str) -> tuple[int, str]:
        async with aiohttp.ClientSession() as session, session.get(f"http://{self.server.address}{path}") as answer:
            return answer.status, await answer.text()


@asynccontextmanager
async def serving() -> AsyncIterator[Place]:
    place = Place()
    await place.server.start()
    try:
        yield place
    finally:
        await place.server.stop()


async def test_health_and_readiness() -> None:
    async with serving() as it:
        assert await it.get("/readyz") == (200, "ready\n")
        it.reasons = ("the daemon is starting", "the catalog is not loaded: no such file")
        status, text = await it.get("/readyz")
        assert status == 503
        assert text.splitlines() == list(it.reasons)
        assert (await it.get("/healthz"))[0] == 200


async def test_metrics_are_served() -> None:
    async with serving() as it:
        it.metrics.hits.labels(level="l1").inc(3)
        status, text = await it.get("/metrics")
        assert status == 200
        assert 'cached_hits_total{level="l1"} 3.0' in text
        assert "process_resident_memory_bytes" in text


async def test_the_status_page_shows_models_and_escapes_them() -> None:
    async with serving() as it:
        it.models = (dataclasses.replace(SUMMARY, name="<script>x"),)
        status, text = await it.get("/")
        assert status == 200
        assert "&lt;script&gt;x" in text
        assert "<script>" not in text
        for told in ("warm (by catalog)", "3m20s", "in use", "pinned, transient, adapter of tiny-base, tenant red"):
            assert told in text
        assert "12 B of 80 B" in text, "what hot models take, and may take"
        it.reasons = ("the daemon is <starting>",)
        assert "the daemon is &lt;starting&gt;" in (await it.get("/"))[1]


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", ":80", "203.0.113.7:0", "no.such.host.invalid:80"])
async def test_a_wrong_address_names_the_setting(listen: str) -> None:
    server = HttpServer(listen, Place().server._views)
    with pytest.raises(ConfigError, match=r"http\.listen") as caught:
        await server.start()
    assert caught.value.fields["value"] == listen


async def test_a_taken_port_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = HttpServer(f"127.0.0.1:{taken.getsockname()[1]}", Place().server._views)
        with pytest.raises(ConfigError, match="in use") as caught:
            await server.start()
        assert caught.value.fields["key"] == "http.listen"
        await server.stop()
