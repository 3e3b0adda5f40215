"""``/ready`` for web frameworks: a WSGI and an ASGI application over a `Readiness`, and what both answer."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, MutableMapping

    from cached_client.warmup.readiness import Readiness

_NOT_FOUND = {"error": "there is only /ready here"}
_NOT_ALLOWED = {"error": "only GET and HEAD are answered"}

Answer = tuple[HTTPStatus, list[tuple[str, str]], bytes]


def answer(readiness: Readiness, method: str, path: str) -> Answer:
    """Status, headers and body: 200 while users may come, else 503, with the same JSON.

    ``path`` may have whatever an application is mounted below before ``/ready``.
    """
    headers: list[tuple[str, str]] = []
    status, body = HTTPStatus.OK, dict[str, object]()
    if method not in {"GET", "HEAD"}:
        status, body = HTTPStatus.METHOD_NOT_ALLOWED, dict(_NOT_ALLOWED)
        headers.append(("Allow", "GET, HEAD"))
    elif not path.rstrip("/").endswith("/ready"):
        status, body = HTTPStatus.NOT_FOUND, dict(_NOT_FOUND)
    else:
        found = readiness.status()
        body = found.to_dict()
        if not found.ready:
            status = HTTPStatus.SERVICE_UNAVAILABLE
            headers.append(("Retry-After", "1"))
    data = json.dumps(body).encode() + b"\n"
    headers += [
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
        ("Cache-Control", "no-store"),
    ]
    return status, headers, b"" if method == "HEAD" else data


def wsgi(readiness: Readiness) -> Callable[[dict[str, Any], Callable[..., object]], Iterable[bytes]]:
    """A WSGI application (PEP 3333), to be mounted or served by itself."""

    def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        path = f"{environ.get('SCRIPT_NAME', '')}{environ.get('PATH_INFO', '')}"
        status, headers, body = answer(readiness, environ["REQUEST_METHOD"], path)
        start_response(f"{status.value} {status.phrase}", headers)
        return [body]

    return application


def asgi(
    readiness: Readiness,
) -> Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Any]], Callable[[dict[str, Any]], Awaitable[None]]],
    Awaitable[None],
]:
    """An ASGI 3 application, to be mounted or served by itself."""

    async def application(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
            return
        if scope["type"] != "http":
            raise NotImplementedError(f"only HTTP is answered here, not {scope['type']}")
        root, path = scope.get("root_path", ""), scope["path"]
        status, headers, body = answer(readiness, scope["method"], path if path.startswith(root) else root + path)
        encoded = [(name.lower().encode("ascii"), value.encode("ascii")) for name, value in headers]
        await send({"type": "http.response.start", "status": status.value, "headers": encoded})
        await send({"type": "http.response.body", "body": body})

    return application


async def _live(receive: Callable[[], Awaitable[Any]], send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
