"""What origins over HTTP must make of servers that break, lie, refuse or change: web servers with a list, and hubs."""

from __future__ import annotations

import hashlib
import json
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cached.errors import (
    CachedError,
    ConfigError,
    InvalidRequestError,
    NotFoundError,
    ObjectChangedError,
    OriginDeniedError,
    OriginError,
    OriginProtocolError,
    OriginUnavailableError,
)
from cached.origins.base import Abort, OriginChecksum, OriginSpec
from cached.origins.registry import open_origin, open_writable
from cached.transfer.fill import RetryPolicy
from tests.conformance.reading import read_range
from tests.fault_proxy import CountingProxy, FaultKind
from tests.http_servers import FileServer, ForwardProxy, Hub, sha256
from tests.servers import make_certificate

DATA = bytes(range(256)) * 4000
TOKEN = "hf_right"


@pytest.fixture
def web() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub() as server:
        yield server


def read(origin: Any, item: Any, offset_bytes: int = 0, length_bytes: int | None = None) -> bytes:
    buffer = bytearray(item.size_bytes - offset_bytes if length_bytes is None else length_bytes)
    read_range(origin, item, offset_bytes, memoryview(buffer))
    return bytes(buffer)


def open_hub(hub: Hub, what: str = "org/repo", **options: str) -> Any:
    return open_origin(OriginSpec(f"hf://{what}", {"endpoint": hub.url, **options}))


def assert_discreet(error: CachedError) -> None:
    text = str(error.to_dict()) + str(error.__cause__)
    assert TOKEN not in text
    assert "secret" not in text
    assert error.hint
    assert type(CachedError.from_dict(error.to_dict())) is type(error)


# --- faults on the way ------------------------------------------------------------------------------------------------

FAULTS: list[tuple[FaultKind, dict[str, Any], type[CachedError]]] = [
    ("truncate", {"after_bytes": 5000}, OriginProtocolError),
    ("short_length", {"after_bytes": 5000}, OriginProtocolError),
    ("wrong_range", {}, OriginProtocolError),
    ("whole", {}, OriginProtocolError),
    ("status", {"status": 503}, OriginUnavailableError),
    ("status", {"status": 500}, OriginUnavailableError),
    ("status", {"status": 429}, OriginUnavailableError),
    ("reset", {}, OriginUnavailableError),
    ("reset", {"after_bytes": 5000}, OriginUnavailableError),
]


@pytest.mark.parametrize("kind_of_origin", ["web", "hub"])
@pytest.mark.parametrize(("kind", "settings", "expected"), FAULTS, ids=lambda value: str(value)[:40])
def test_a_fault_is_the_right_error_once_and_then_forgotten(request, kind_of_origin, kind, settings, expected):
    server = request.getfixturevalue(kind_of_origin)
    upstream = server.url if kind_of_origin == "web" else server.cdn.url
    with CountingProxy(upstream) as proxy:
        if kind_of_origin == "web":
            server.put("m/w", DATA)
            origin = open_origin(OriginSpec(f"{proxy.endpoint_url}/m/"))
        else:
            server.commit("org/repo", {"w": DATA})
            server.cdn_url = proxy.endpoint_url
            origin = open_hub(server)
        item = origin.stat("w")
        fault = proxy.inject(kind, ranged=True, **settings)
        with pytest.raises(expected) as error:
            read(origin, item, 1000, 20_000)
        assert type(error.value) is expected
        assert_discreet(error.value)
        assert fault.hits == 1, "the origin does not retry: that is the planner's"
        assert read(origin, item, 1000, 20_000) == DATA[1000:21_000]
        assert len([seen for seen in proxy.gets() if seen.range]) == 2
        origin.close()


def test_denied_on_the_way_to_one_file(web):
    web.put("m/w", DATA)
    with CountingProxy(web.url) as proxy:
        origin = open_origin(OriginSpec(f"{proxy.endpoint_url}/m/"))
        item = origin.stat("w")
        proxy.inject("status", status=403, ranged=True)
        with pytest.raises(OriginDeniedError, match="403"):
            read(origin, item, 0, 100)
        proxy.inject("etag", ranged=True)
        with pytest.raises(ObjectChangedError):
            read(origin, item, 0, 100)
        origin.close()


def test_connections_are_used_again(web):
    web.put("m/w", DATA)
    with CountingProxy(web.url) as proxy:
        origin = open_origin(OriginSpec(f"{proxy.endpoint_url}/m/"))
        item = origin.stat("w")
        for number in range(10):
            assert read(origin, item, number * 1000, 1000) == DATA[number * 1000 :][:1000]
        assert proxy.connections == 1
        origin.close()


def assert_an_abort_ends_a_read(origin: Any, proxy: CountingProxy) -> None:
    item = origin.stat("w")
    fault = proxy.inject("hold", after_bytes=300_000)
    abort = Abort()
    ended: list[BaseException] = []

    def wait() -> None:
        try:
            with origin.open_range(item, 0, len(DATA), abort) as read_into:
                read_into(memoryview(bytearray(len(DATA))))
        except CachedError as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert fault.reached.wait(30)
    abort.abort()
    thread.join(10)
    assert [type(error) for error in ended] in ([OriginProtocolError], [OriginUnavailableError])
    proxy.heal()
    origin.close()


def test_an_abort_ends_a_read_that_waits(web):
    web.put("m/w", DATA)
    with CountingProxy(web.url) as proxy:
        assert_an_abort_ends_a_read(open_origin(OriginSpec(f"{proxy.endpoint_url}/m/")), proxy)


def test_a_wait_that_the_server_asks_for_is_kept_to(web):
    web.put("m/w", DATA)

    class Busy(FileServer):
        def handle(self, request):
            request.answer(429, b"slow down", Retry_After="7")

    with Busy() as busy, pytest.raises(OriginUnavailableError) as error:
        open_origin(OriginSpec(f"{busy.url}/m/")).list_objects()
    assert error.value.fields["retry_after_s"] == "7.000"
    retry = RetryPolicy(max_attempts=6, budget_s=120.0)
    assert all(7.0 <= retry.delay_s(1, error.value) <= 7.5 for _ in range(100))
    assert retry.delay_s(1) <= 0.4
    assert RetryPolicy(max_attempts=6, budget_s=2.0).delay_s(1, error.value) <= 2.5


# --- web servers ------------------------------------------------------------------------------------------------------


def test_checksums_come_from_the_list(web):
    web.put("m/w", DATA)
    origin = open_origin(OriginSpec(f"{web.url}/m/"))
    assert origin.stat("w").checksums == (OriginChecksum("sha256", hashlib.sha256(DATA).hexdigest()),)
    assert origin.list_objects()[0].checksums == ()
    web.put("m/w", DATA[::-1])
    assert origin.stat("w").checksums == (OriginChecksum("sha256", hashlib.sha256(DATA[::-1]).hexdigest()),)


@pytest.mark.parametrize(
    "text",
    [
        "config.json\n./sub/w\n",
        "# comment\r\nconfig.json\r\n\r\nsub/w\r\n",
        json.dumps(["config.json", "sub/w"]),
        json.dumps({"files": [{"path": "config.json", "size": 3}, {"path": "sub/w"}]}),
        json.dumps({"files": {"config.json": sha256(b"{}"), "sub/w": sha256(DATA)}}),
        f"{sha256(b'{}')} *config.json\n{sha256(DATA).upper()}  sub/w\n",
    ],
)
def test_lists_of_several_kinds(web, text):
    web.put("m/config.json", b"{}")
    web.put("m/sub/w", DATA)
    web.put("lists/m", text.encode())
    origin = open_origin(OriginSpec(f"{web.url}/m", {"list": "/lists/m"}))
    assert [item.path for item in origin.list_objects()] == ["config.json", "sub/w"]
    assert bool(origin.stat("sub/w").checksums) == (sha256(DATA)[:8] in text.lower())


@pytest.mark.parametrize("text", ["../w", "/w", "", "[]", '{"files": 3}', "{", "a\na", '[{"path": 1}]', b"\xff\xfe"])
def test_lists_that_cannot_be_used_are_named(web, text):
    web.put("lists/m", text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidRequestError) as error:
        open_origin(OriginSpec(f"{web.url}/m", {"list": "/lists/m"})).list_objects()
    assert error.value.hint


def test_files_may_be_named_without_a_list(web):
    web.put("m/config.json", b"{}")
    web.put("m/w", DATA)
    origin = open_origin(OriginSpec(f"{web.url}/m", {"files": "w\nconfig.json\n"}))
    assert [item.path for item in origin.list_objects()] == ["config.json", "w"]
    assert origin.stat("w").checksums == ()


def test_a_folder_without_a_list_says_how_to_give_one(web):
    web.put("m/w", DATA)
    web.delete("m/w")
    for uri in (f"{web.url}/m", f"{web.url}/m/"):
        with pytest.raises(NotFoundError, match="SHA256SUMS") as error:
            open_origin(OriginSpec(uri)).list_objects()
        assert "sha256sum" in error.value.hint
        assert "catalog" in error.value.hint


@pytest.mark.parametrize("status", [403, 500, 200])
def test_a_folder_that_the_server_does_not_list_needs_no_slash(status):
    class Nginx(FileServer):
        def handle(self, request):
            if request.path == "/a%20b":
                request.answer(301, b"", Location="/a%20b/")
            elif request.path == "/a%20b/":
                request.answer(status, b"")
            else:
                super().handle(request)

    with Nginx() as web:
        web.put("a b/w", DATA)
        origin = open_origin(OriginSpec(f"{web.url}/a%20b"))
        (item,) = origin.list_objects()
        assert item.path == "w"
        assert read(origin, origin.stat("w"), 5, 10) == DATA[5:15]


def test_a_server_without_etags_is_held_to_its_dates(web):
    web.etags = False
    web.put("m/w", DATA)
    origin = open_origin(OriginSpec(f"{web.url}/m/"))
    item = origin.stat("w")
    assert read(origin, item) == DATA
    web.put("m/w", DATA[::-1])
    with pytest.raises(ObjectChangedError):
        read(origin, item, 0, 100)


def test_a_server_that_tells_no_version_needs_a_checksum(web):
    web.etags = web.dates = False
    web.put("m/w", DATA)
    origin = open_origin(OriginSpec(f"{web.url}/m/"))
    assert origin.stat("w").version == f"sha256:{sha256(DATA)}"
    assert read(origin, origin.stat("w"), 5, 10) == DATA[5:15]
    with pytest.raises(OriginError, match="neither ETag nor Last-Modified"):
        open_origin(OriginSpec(f"{web.url}/m", {"files": "w"})).list_objects()


def test_a_server_that_ignores_ranges_is_refused_where_one_is_needed(web):
    web.ranges = False
    web.put("m/w", DATA)
    origin = open_origin(OriginSpec(f"{web.url}/m/"))
    item = origin.stat("w")
    assert read(origin, item) == DATA
    with pytest.raises(OriginError, match="does not serve ranges") as error:
        read(origin, item, 0, 100)
    assert not error.value.retryable


def test_a_token_is_sent_to_its_server_alone(web, tmp_path):
    (tmp_path / "token").write_text("web-secret\n")
    web.token = "web-secret"
    web.put("m/w", DATA)
    with FileServer() as other:
        other.put("list", b"w\n")
        with pytest.raises(OriginDeniedError) as error:
            open_origin(OriginSpec(f"{web.url}/m", {"list": f"{other.url}/list"})).list_objects()
        assert "token_file" in error.value.hint
        other.seen.clear()
        options = {"list": f"{other.url}/list", "token_file": str(tmp_path / "token")}
        origin = open_origin(OriginSpec(f"{web.url}/m", options))
        assert read(origin, origin.stat("w")) == DATA
        assert other.seen
        assert set(other.seen) == {""}
    (tmp_path / "token").write_text("other-secret\n")
    with pytest.raises(OriginDeniedError) as error:
        open_origin(OriginSpec(f"{web.url}/m", {"files": "w", "token_file": str(tmp_path / "token")})).stat("w")
    assert_discreet(error.value)
    with pytest.raises(ConfigError, match="nowhere"):
        open_origin(OriginSpec(f"{web.url}/m", {"token_file": str(tmp_path / "nowhere")}))


def test_redirects_are_followed_but_never_to_a_less_safe_place(web, tmp_path):
    web.put("real/w", DATA)

    class Elsewhere(FileServer):
        target = web.url

        def handle(self, request):
            request.answer(302, b"", Location=f"{self.target}/real/w?signature=secret")

    with Elsewhere() as server:
        origin = open_origin(OriginSpec(f"{server.url}/m", {"files": "w"}))
        assert read(origin, origin.stat("w"), 1000, 50) == DATA[1000:1050]
        server.target = server.url
        with pytest.raises(OriginError, match="redirects"):
            origin.stat("w")
    with Elsewhere() as safe:
        certificate, key = make_certificate(tmp_path)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        safe._server.socket = context.wrap_socket(safe._server.socket, server_side=True)
        url = safe.url.replace("http:", "https:")
        origin = open_origin(OriginSpec(f"{url}/m", {"files": "w", "ca_bundle": str(certificate)}))
        with pytest.raises(OriginError, match="less safe") as error:
            origin.stat("w")
        assert_discreet(error.value)
        with pytest.raises(OriginError, match="certificate") as error:
            open_origin(OriginSpec(f"{url}/m", {"files": "w"})).stat("w")
        assert "ca_bundle" in error.value.hint
        origin.close()


def test_a_proxy_of_the_environment_is_used(web, monkeypatch):
    web.put("m/w", DATA)
    with ForwardProxy(web.url) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        origin = open_origin(OriginSpec("http://models.example/m", {"files": "w"}))
        assert read(origin, origin.stat("w"), 10, 100) == DATA[10:110]
        assert proxy.asked == ["HEAD http://models.example/m/w", "GET http://models.example/m/w"]
        direct = open_origin(OriginSpec(f"{web.url}/m", {"files": "w"}))
        assert direct.stat("w").size_bytes == len(DATA)
        assert len(proxy.asked) == 2


def test_a_proxy_is_a_tunnel_for_https_and_an_abort_ends_a_read_through_it(web, monkeypatch, tmp_path):
    certificate, key = make_certificate(tmp_path)
    with CountingProxy(web.url) as slow, FileServer() as tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        tls._server.socket = context.wrap_socket(tls._server.socket, server_side=True)
        tls.put("m/w", DATA)
        with ForwardProxy(tls.url) as proxy:
            monkeypatch.setenv("https_proxy", proxy.url)
            monkeypatch.setenv("no_proxy", "")
            options = {"files": "w", "ca_bundle": str(certificate)}
            origin = open_origin(OriginSpec("https://localhost/m", options))
            assert read(origin, origin.stat("w"), 10, 100) == DATA[10:110]
            assert proxy.asked == ["CONNECT localhost:443"]
            origin.close()
        web.put("m/w", DATA)
        with ForwardProxy(slow.endpoint_url) as proxy:
            monkeypatch.setenv("http_proxy", proxy.url)
            origin = open_origin(OriginSpec("http://models.example/m", {"files": "w"}))
            assert_an_abort_ends_a_read(origin, slow)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_gets_the_user_and_the_password_of_its_url(monkeypatch, tmp_path, scheme):
    with FileServer() as server:
        certificate, key = make_certificate(tmp_path)
        if scheme == "https":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, key)
            server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        server.put("m/w", DATA)
        with ForwardProxy(server.url) as proxy:
            proxy.user = "us@er:s\u00e9cret:\u20ac"
            monkeypatch.setenv("no_proxy", "")
            spec = OriginSpec(f"{scheme}://localhost/m", {"files": "w", "ca_bundle": str(certificate)})
            for user in ("", "us%40er:wrong-secret@"):
                monkeypatch.setenv(f"{scheme}_proxy", proxy.url.replace("://", f"://{user}"))
                with pytest.raises(OriginDeniedError, match="proxy") as error:
                    open_origin(spec).stat("w")
                assert "USER:PASSWORD" in error.value.hint
                assert_discreet(error.value)
            monkeypatch.setenv(f"{scheme}_proxy", proxy.url.replace("://", "://us%40er:s%C3%A9cret%3A%E2%82%AC@"))
            origin = open_origin(spec)
            assert read(origin, origin.stat("w"), 10, 100) == DATA[10:110]
            origin.close()


@pytest.mark.parametrize(
    ("uri", "options"),
    [
        ("https://", {}),
        ("https://user:secret@host/x", {}),
        ("https://host/x?token=secret", {}),
        ("https://host/x#secret", {}),
        ("https://host:99999/x", {}),
        ("http://host:abc/x", {}),
        ("https://[::1/m/", {}),
        ("file://[x/b", {}),
        ("file:///tmp/a%00b", {}),
        ("https://host/x", {"list": "http://[x/list"}),
        ("hf://org/repo", {"endpoint": "http://host:99999"}),
        ("https://host/x", {"endpoint": "http://x"}),
        ("https://host/x", {"files": "../y"}),
        ("https://host/x", {"list": "http://host/list"}),
        ("https://host/x", {"read_timeout_s": "soon"}),
        ("https://host/x", {"ca_bundle": "/not/there.pem"}),
        ("hf://repo", {}),
        ("hf://org/repo@", {}),
        ("hf://datasets/org/repo", {}),
        ("hf://user:secret@org/repo", {}),
        ("hf://org/repo@main/../x", {}),
        ("hf://org/repo?token=secret", {}),
        ("hf://org/repo", {"endpoint": "ftp://x"}),
        ("hf://org/repo", {"endpoint": "https://user:secret@x"}),
        ("hf://org/repo", {"token": "secret"}),
    ],
)
def test_wrong_uris_and_options_are_refused_at_once(uri, options):
    with pytest.raises(InvalidRequestError) as error:
        open_origin(OriginSpec(uri, options))
    assert error.value.hint
    assert "secret" not in str(error.value.to_dict())


def test_nothing_is_uploaded_there():
    for uri in ("hf://org/repo", "https://host/x", "gs://bucket/x"):
        with pytest.raises(InvalidRequestError, match="uploaded") as error:
            open_writable(OriginSpec(uri))
        assert "s3://" in error.value.hint
