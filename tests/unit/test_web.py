"""The HTTP pages over a real listener."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gzip
import hashlib
import re
import resource
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import aiohttp
import pytest

from cached.cache.events import EventBus
from cached.cache.failures import Failures
from cached.clock import SystemClock
from cached.errors import ConfigError
from cached.metrics import Metrics
from cached.overview import Limits, Overview
from cached.web.connections import Connections
from cached.web.http import HttpServer, Views
from cached.web.page import Renderer, StatusPage
from cached.web.view import view_of
from tests.unit.rpc_support import OVERVIEW, STATS, SUMMARY


class Place:
    def __init__(self) -> None:
        self.reasons: tuple[str, ...] = ()
        self.overview: Overview | None = OVERVIEW
        self.looks = 0
        self.metrics = Metrics("1.2")
        self.events = EventBus(SystemClock())
        self.failures = Failures(self.events, self.metrics, SystemClock())
        views = Views(self.metrics, lambda: self.reasons, self.look, host="node-<7>")
        self.server = HttpServer("127.0.0.1:0", views, self.failures)

    def look(self, limits: Limits) -> Overview | None:
        self.looks += 1
        return self.overview

    async def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[aiohttp.ClientResponse, bytes]:
        url = f"http://{self.server.address}{path}"
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(method, url, headers={"Accept-Encoding": "identity", **headers}) as answer,
        ):
            return answer, await answer.read()

    async def get(self, path: str) -> tuple[int, str]:
        answer, body = await self.ask(path)
        return answer.status, body.decode()


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


async def test_the_status_page_shows_everything_escaped() -> None:
    async with serving() as it:
        model = dataclasses.replace(SUMMARY, name="<script>x", tenant='"><img src=x>')
        event = dataclasses.replace(OVERVIEW.events[0], message='it\'s "quoted" & \u202eturned\x1b[31m')
        it.overview = dataclasses.replace(OVERVIEW, models=(model,), events=(event,))
        status, text = await it.get("/")
        assert status == 200
        assert "cached <b>on</b> node-&lt;7&gt;" in text
        assert "&lt;script&gt;x" in text
        assert text.count("<script>") == 1
        assert "<img" not in text
        assert "it&#39;s &#34;quoted&#34; &amp; \ufffdturned\ufffd[31m" in text
        for told in (
            "70 B</b> of 100 B",
            "limited by: configured",
            "hot models have 12 B of 80 B",
            "7 B held by workers",
            "pull to L1",
            "40 % · 400 B of 1000 B",
            "from s3://b/tiny",
            "waited for by vllm (pid 7) and 1 more",
            "L2 33 % written",
            "warm <small>catalog",
            "in use",
            "3m20s",
            "pinned, transient, adapter of tiny-base, tenant",
            "python3 in pod 1c7f9e0b, pid 13, uid 14",
            "and 2 more: <code>cached ls",
            "and 1 more: <code>cached ps",
            "and 1 more: <code>cached top",
            "L2 could not be written",
            "x: s3://b/x: 403",
            "cached show x has the whole error",
        ):
            assert told in text, told


async def test_states_of_the_daemon_in_words() -> None:
    async with serving() as it:
        assert '<p class="chip degraded" role="status">degraded</p>' in (await it.get("/"))[1]
    async with serving() as it:
        it.overview = dataclasses.replace(OVERVIEW, problems=())
        assert "all is well" in (await it.get("/"))[1]
    async with serving() as it:
        it.overview, it.reasons = None, ("the daemon is starting",)
        text = (await it.get("/"))[1]
        assert "The daemon is starting" in text
        assert "Models" not in text
    async with serving() as it:
        it.reasons = ("the daemon is draining", "the catalog is not loaded: no such <file>")
        text = (await it.get("/"))[1]
        assert "no such &lt;file&gt;" in text
        assert "Nothing new begins" in text
        assert "held by workers" in text, "what it has is still shown"


async def test_a_daemon_that_has_nothing_says_what_to_do() -> None:
    async with serving() as it:
        it.overview = Overview(time_s=1.0, stats=dataclasses.replace(STATS, levels=(), lease_count=0))
        text = (await it.get("/"))[1]
        for told in (
            "No model is known yet",
            "No worker holds a model",
            "Nothing is being pulled",
            "Nothing was decided",
        ):
            assert told in text


async def test_the_page_allows_itself_and_nothing_else() -> None:
    async with serving() as it:
        answer, body = await it.ask("/")
        policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        for tag, directive in (("script", "script-src"), ("style", "style-src")):
            found = re.findall(rf"<{tag}>(.*?)</{tag}>", body.decode(), re.DOTALL)
            assert len(found) == 1
            digest = base64.b64encode(hashlib.sha256(found[0].encode()).digest()).decode()
            assert policy[directive] == f"'sha256-{digest}'"
        assert " style=" not in body.decode()
        assert not re.search(r"(src|href)=.https?:", body.decode())
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["Referrer-Policy"] == "no-referrer"


async def test_it_is_read_only() -> None:
    async with serving() as it:
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert (await it.ask("/", method))[0].status == 405
        answer, body = await it.ask("/", "HEAD")
        assert (answer.status, body) == (200, b"")
        assert it.looks == 1


async def test_it_comes_packed_to_who_can_unpack_it() -> None:
    async with serving() as it:
        plain = (await it.ask("/"))[1]
        answer, packed = await it.ask("/", **{"Accept-Encoding": "br, gzip"})
        assert answer.headers["Content-Encoding"] == "gzip"
        assert gzip.decompress(packed) == plain


async def test_many_who_look_at_once_cost_one_look() -> None:
    async with serving() as it:
        pages = await asyncio.gather(*(it.get("/") for _ in range(20)))
        assert len({text for _, text in pages}) == 1
        assert it.looks == 1


def test_a_busy_host_makes_a_small_page() -> None:
    limits = Limits()
    models = tuple(dataclasses.replace(SUMMARY, name=f"org--model-{n:04}-instruct-fp8") for n in range(limits.models))
    why = "it was worth least for each byte: 14.9 GiB that spare 40 s of waiting in the next six hours"
    event = dataclasses.replace(OVERVIEW.events[0], message=f"org--model-0001-instruct-fp8 left l1: {why}")
    overview = dataclasses.replace(
        OVERVIEW, models=models, model_count=5000, leases=OVERVIEW.leases * limits.leases,
        events=(event,) * limits.events, cold_starts=OVERVIEW.cold_starts * limits.cold_starts,
        moves=OVERVIEW.moves * limits.moves,
    )  # fmt: skip
    html = Renderer().html(view_of(overview, (), host="h", now_s=2000.0)).encode()
    assert len(html) < 100_000
    assert len(gzip.compress(html, 3)) < 16_000
    assert b"and 4800 more" in html


def server_on(listen: str, connections: Connections | None = None) -> HttpServer:
    place = Place()
    return HttpServer(listen, place.server._views, place.failures, connections)


@pytest.mark.parametrize("listen", ["nonsense", "127.0.0.1:99999", ":80", "203.0.113.7:0", "no.such.host.invalid:80"])
async def test_a_wrong_address_names_the_setting(listen: str) -> None:
    server = server_on(listen)
    with pytest.raises(ConfigError, match=r"http\.listen") as caught:
        await server.start()
    assert caught.value.fields["value"] == listen


async def test_a_taken_port_names_the_setting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = server_on(f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ConfigError, match="in use") as caught:
            await server.start()
        assert caught.value.fields["key"] == "http.listen"
        await server.stop()


@asynccontextmanager
async def bounded(connections: Connections) -> AsyncIterator[tuple[str, int]]:
    server = server_on("127.0.0.1:0", connections)
    await server.start()
    try:
        host, port = server.address.split(":")
        yield host, int(port)
    finally:
        await server.stop()


async def test_connections_without_a_request_are_closed_and_answers_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, asked = asyncio.Event(), asyncio.Event()

    async def page(_page: StatusPage) -> object:
        asked.set()
        await slow.wait()
        raise RuntimeError("nothing to show")

    monkeypatch.setattr(StatusPage, "get", page)
    async with bounded(Connections(8, idle_s=0.2)) as (host, port):
        answered, asking = await asyncio.open_connection(host, port)
        asking.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await asked.wait()
        for said in (b"", b"GET / HTTP/1.1\r\nHos", b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(said)
            async with asyncio.timeout(20):
                with suppress(ConnectionResetError):
                    told = await reader.read()
            assert (b"200 OK" in told) == said.endswith(b"\r\n\r\n")
            writer.close()
        slow.set()
        async with asyncio.timeout(20):
            assert b" 500 " in await answered.readline(), "it took longer than a connection may be silent"
        asking.close()


async def test_connections_have_a_bound_and_who_is_beyond_it_is_told() -> None:
    async with bounded(Connections(2)) as (host, port):
        held = [await asyncio.open_connection(host, port) for _ in range(2)]
        for _, writer in held:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        for reader, _ in held:
            assert b"200 OK" in await reader.readline()
        reader, writer = await asyncio.open_connection(host, port)
        assert b" 503 " in await reader.readline()
        writer.close()
        held.pop()[1].close()
        async with asyncio.timeout(20):
            while True:
                reader, writer = await asyncio.open_connection(host, port)
                writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
                line = await reader.readline()
                writer.close()
                if b"200 OK" in line:
                    break
        held.pop()[1].close()


async def test_all_addresses_of_a_name_are_served_on_one_port() -> None:
    server = server_on("localhost:0")
    await server.start()
    try:
        port = int(server.address.rpartition(":")[2])
        found = await asyncio.get_running_loop().getaddrinfo("localhost", port, type=socket.SOCK_STREAM)
        for host in {address[0] for _, _, _, _, address in found}:
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await reader.readline()
            writer.close()
    finally:
        await server.stop()


async def test_who_comes_while_no_descriptor_is_left_is_served_later_and_that_is_told_once() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with serving() as place:
        host, port = place.server.address.split(":")
        with socket.socket() as client:
            client.setblocking(False)
            with socket.socket() as free:
                lowest_free = free.fileno()
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
            try:
                await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
                await asyncio.sleep(1.2)  # it has tried again by then
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            assert [event.kind for event in place.events.recent] == ["http.accept_failed"]
            await asyncio.get_running_loop().sock_sendall(client, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            async with asyncio.timeout(20):
                assert b"200 OK" in await asyncio.get_running_loop().sock_recv(client, 1 << 16)
