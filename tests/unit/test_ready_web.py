"""/ready over HTTP: the tiny server, a WSGI application, an ASGI application, each behind a real server."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from wsgiref.simple_server import WSGIRequestHandler, make_server
from wsgiref.util import shift_path_info
from wsgiref.validate import validator

import pytest
import uvicorn

from cached_client.warmup import Readiness, ReadyServer, asgi, wsgi
from tests.unit.client_support import eventually
from tests.unit.test_readiness import warm


@contextlib.contextmanager
def tiny(readiness):
    with ReadyServer(readiness) as server:
        assert server.url == f"http://127.0.0.1:{server.port}/ready"
        yield server.port, "/ready"


@contextlib.contextmanager
def wsgi_server(application):
    class Quiet(WSGIRequestHandler):
        def log_message(self, *_):
            pass

    with make_server("127.0.0.1", 0, application, handler_class=Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def plain_wsgi(readiness):
    with wsgi_server(validator(wsgi(readiness))) as port:
        yield port, "/ready"


@contextlib.contextmanager
def mounted_wsgi(readiness):
    ready = wsgi(readiness)

    def application(environ, start_response):
        shift_path_info(environ)
        return ready(environ, start_response)

    with wsgi_server(validator(application)) as port:
        yield port, "/health/ready"


@contextlib.contextmanager
def uvicorn_server(application, **options):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(application, log_config=None, **options))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        eventually(lambda: server.started, "uvicorn")
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def plain_asgi(readiness):
    with uvicorn_server(asgi(readiness), lifespan="on") as port:
        yield port, "/ready"


@contextlib.contextmanager
def mounted_asgi(readiness):
    ready = asgi(readiness)

    async def application(scope, receive, send):
        await ready({**scope, "root_path": "/health", "path": scope["path"].removeprefix("/health")}, receive, send)

    with uvicorn_server(application, lifespan="off") as port:
        yield port, "/health/ready"


def ask(port, path, method="GET", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("serving", [tiny, plain_wsgi, mounted_wsgi, plain_asgi, mounted_asgi])
def test_it_answers_503_until_it_is_warm_and_again_when_the_model_is_lost(serving):
    readiness = Readiness()
    with serving(readiness) as (port, path):
        status, headers, body = ask(port, path)
        told = json.loads(body)
        assert status == 503
        assert (told["state"], told["ready"], told["reason"]) == ("cold", False, "nothing was loaded yet")
        assert (headers["Content-Type"], headers["Retry-After"], headers["Cache-Control"]) == (
            "application/json", "1", "no-store",
        )  # fmt: skip
        with readiness.loading():
            status, _, body = ask(port, path)
            assert (status, json.loads(body)["state"]) == (503, "loading")
        status, _, body = ask(port, path)
        assert (status, json.loads(body)["state"]) == (503, "warming")
        model = warm(readiness)
        status, headers, body = ask(port, f"{path}?verbose=1")
        assert (status, json.loads(body)["ready"], json.loads(body)["models"]) == (200, True, ["tiny"])
        assert headers["Retry-After"] is None
        assert ask(port, path, "HEAD")[::2] == (200, b"")
        assert ask(port, f"{path}/")[0] == 200
        model.lease_lost = "the daemon was restarted without it"
        status, _, body = ask(port, path)
        assert status == 503
        assert json.loads(body)["reason"] == "the lease of tiny is lost: the daemon was restarted without it"
        assert ask(port, "/elsewhere")[0] == 404
        status, headers, _ = ask(port, path, "POST", b'{"a": 1}')
        assert (status, headers["Allow"]) == (405, "GET, HEAD")
        assert ask(port, path)[0] == 503


def test_a_client_that_says_nothing_holds_nothing_up():
    readiness = Readiness()
    with ReadyServer(readiness) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as silent:
            assert ask(server.port, "/ready")[0] == 503
            silent.sendall(b"GET /rea")
            assert ask(server.port, "/ready")[0] == 503
            server.close()
        port = server.port
        with pytest.raises(ConnectionRefusedError):
            ask(port, "/ready")
        with ReadyServer(readiness, port=port) as again:
            assert ask(again.port, "/ready")[0] == 503
    assert not any(thread.name == "cached-ready" for thread in threading.enumerate())


async def test_only_http_is_answered():
    with pytest.raises(NotImplementedError, match="websocket"):
        await asgi(Readiness())({"type": "websocket"}, None, None)
