"""A tiny HTTP server that answers ``/ready``, for workers that have none of their own."""

from __future__ import annotations

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from cached_client.warmup.web import answer

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from cached_client.warmup.readiness import Readiness

_log = logging.getLogger("cached_client")

_SILENT_S = 5.0
_POLL_S = 0.1


class ReadyServer:
    """Answers from its making to `close`, in threads of its own. As a context manager it is closed at the end.

    ``host`` is the loopback interface unless another is named: the kubelet needs ``"0.0.0.0"`` or the pod's address.
    ``port`` 0 takes a free one; see `port`. Raises OSError where it cannot listen.
    """

    def __init__(self, readiness: Readiness, *, host: str = "127.0.0.1", port: int = 0) -> None:
        self._server = _Server((host, port), readiness)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": _POLL_S}, name="cached-ready", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Of ``/ready``."""
        host = self._server.server_address[0]
        return f"http://{host if isinstance(host, str) else host.decode()}:{self.port}/ready"

    def close(self) -> None:
        """Answers no more, and gives the port back. Idempotent."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that says nothing must not hold up the end

    def __init__(self, address: tuple[str, int], readiness: Readiness) -> None:
        self.readiness = readiness
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 the library's parameters
        """A client that went away is no news for standard error, where the library would print it."""
        _log.debug("a request of %s failed", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server_version = "cached-ready"
    protocol_version = "HTTP/1.1"
    timeout = _SILENT_S  # of a connection that says nothing

    def _answer(self) -> None:
        server = self.server
        assert isinstance(server, _Server)  # noqa: S101 for the type checker: only it makes handlers
        status, headers, body = answer(server.readiness, self.command, self.path.partition("?")[0])
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        if self.command not in {"GET", "HEAD"}:
            self.close_connection = True  # what its body holds is not the next request

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer  # noqa: N815 the library's names

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the library's name
        """Probes come every second: not a line each on standard error."""
        _log.debug(format, *args)
