"""The requests of one origin: redirects are followed, and its credential is shown only to the server it is for."""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import urllib3

from cached.config import proxy_of
from cached.errors import OriginError, OriginProtocolError
from cached.origins.net.addresses import Addresses
from cached.origins.net.connections import pool_classes
from cached.origins.net.failures import RAISED, Failures
from cached.origins.net.options import NetOptions, refuse
from cached.urls import link_of, server_of, without_query

_MAX_HOPS = 5
_MAX_TEXT_BYTES = 64 << 20
_MAX_SAID = 300
_REDIRECTS = {301, 302, 303, 307, 308}
_USER_AGENT = "cached"
_ALL_CONNECTIONS = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful answer whose body is still to be read. ``url``: where it came from in the end."""

    status: int
    headers: Mapping[str, str]
    url: str
    raw: urllib3.BaseHTTPResponse


@dataclass(frozen=True, slots=True)
class Hop:
    """A redirect on the way to an answer: who answered it, and where to."""

    url: str
    headers: Mapping[str, str]
    location: str


Authorization = Callable[[], str]
"""A header's value for the next request; empty: none."""

OnHop = Callable[[Hop], None]
"""Looks at a redirect before it is followed; may raise."""


class Session:
    """Requests over connections that are kept. Thread-safe. Does not retry.

    ``authorization`` gives the header's value, or nothing; it is sent to ``home`` (a URL) and to no other server.
    """

    def __init__(
        self, options: NetOptions, failures: Failures, *, home: str, authorization: Authorization = str
    ) -> None:
        self._failures = failures
        self._home = server_of(home)
        self._authorization = authorization
        self._settings: dict[str, Any] = {
            "maxsize": _ALL_CONNECTIONS,
            "timeout": urllib3.Timeout(connect=options.connect_timeout_s, read=options.read_timeout_s),
            "retries": False,
            "ssl_context": _context(options.ca_bundle),
        }
        self._lock = threading.Lock()
        self._pools: dict[str, urllib3.PoolManager] = {}

    def ask(
        self,
        method: str,
        url: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        expected_version: str = "",
        on_hop: OnHop | None = None,
    ) -> Answer:
        """The answer, after any redirects. Its body has to be read to its end, or ``raw`` closed.

        ``path``: what it is about, for errors. ``on_hop`` sees each redirect before it is followed. Raises CachedError
        for anything but success; 304 is one for a request that has a condition.
        """
        sent = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity", **(headers or {})}
        for _ in range(_MAX_HOPS + 1):
            raw = self._send(method, url, path, sent)
            if raw.status in {200, 206, 304}:
                return Answer(raw.status, raw.headers, url, raw)
            if raw.status not in _REDIRECTS or not raw.headers.get("Location"):
                raise self._refused(raw, path, expected_version)
            raw.drain_conn()
            target = link_of(url, raw.headers["Location"])
            if not target:
                raise self._failures.make(
                    OriginProtocolError, "it redirects to what is no URL", path, cause="redirect",
                    hint="look at the URL",
                )  # fmt: skip
            if on_hop is not None:
                on_hop(Hop(url, raw.headers, target))
            url = self._followed(url, target, path)
        raise self._failures.make(
            OriginError, f"more than {_MAX_HOPS} redirects", path, cause="redirects", hint="look at the URL"
        )

    def head(self, url: str, path: str, *, on_hop: OnHop | None = None) -> Answer:
        """The headers alone."""
        answer = self.ask("HEAD", url, path, on_hop=on_hop)
        answer.raw.drain_conn()
        return answer

    def text(self, url: str, path: str, headers: Mapping[str, str] | None = None) -> tuple[Answer, bytes]:
        """A small body, whole; empty for 304. Raises OriginError if it is not small."""
        answer = self.ask("GET", url, path, headers)
        with self._failures.typed(path):
            data = answer.raw.read(_MAX_TEXT_BYTES + 1)
        answer.raw.close() if len(data) > _MAX_TEXT_BYTES else answer.raw.release_conn()
        if len(data) > _MAX_TEXT_BYTES:
            raise self._failures.make(
                OriginError, "the answer has more than 64 MiB", path, cause="too long", hint="look at the URL"
            )
        return answer, data

    def json(self, url: str, path: str) -> tuple[Answer, Any]:
        """A small body of JSON."""
        answer, data = self.text(url, path)
        try:
            return answer, json.loads(data)
        except (ValueError, RecursionError):
            raise self._failures.make(
                OriginError, "the answer is not JSON", path, cause="not JSON",
                hint=f"look whether {without_query(url)} is what you mean",
            ) from None  # fmt: skip

    def close(self) -> None:
        """Ends idle connections; those in use end with their use."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for manager in pools.values():
            manager.clear()

    def _manager(self, url: str) -> urllib3.PoolManager:
        """Direct connections, or those through the proxy that the environment names for this host."""
        proxy = proxy_of(url)
        with self._lock:
            found = self._pools.get(proxy)
            if found is None:
                found = _proxied(proxy, self._settings) if proxy else urllib3.PoolManager(**self._settings)
                found.pool_classes_by_scheme = pool_classes(Addresses())
                self._pools[proxy] = found
            return found

    def _send(self, method: str, url: str, path: str, headers: Mapping[str, str]) -> urllib3.BaseHTTPResponse:
        headers = dict(headers)
        if server_of(url) == self._home and (shown := self._authorization()):
            headers["Authorization"] = shown
        try:
            return self._manager(url).request(method, url, headers=headers, preload_content=False, redirect=False)
        except RAISED as error:
            raise self._failures.translate(error, path) from None

    def _refused(self, raw: urllib3.BaseHTTPResponse, path: str, expected_version: str) -> Exception:
        with self._failures.typed(path):
            said = raw.read(_MAX_SAID * 4)
            raw.close()
        told = raw.headers.get("X-Error-Message") or " ".join(said.decode("utf-8", "replace").split())
        text = "" if told.startswith("<") else told[:_MAX_SAID]
        return self._failures.answered(raw.status, raw.headers, text, path, expected_version=expected_version)

    def _followed(self, url: str, target: str, path: str) -> str:
        if not target.startswith(("http://", "https://")) or (url.startswith("https:") and target.startswith("http:")):
            raise self._failures.make(
                OriginError, f"it redirects to {without_query(target)}, which is less safe", path, cause="redirect",
                hint="look at the URL; redirects from https:// to anything else are not followed",
            )  # fmt: skip
        return target


def _proxied(proxy: str, settings: Mapping[str, Any]) -> urllib3.ProxyManager:
    """urllib3 takes no user and password from the proxy's URL, and its ``make_headers`` only those of Latin-1."""
    user = urllib3.util.parse_url(proxy).auth
    shown = f"Basic {base64.b64encode(unquote(user).encode()).decode()}" if user else ""
    return urllib3.ProxyManager(proxy, proxy_headers={"Proxy-Authorization": shown} if shown else None, **settings)


def _context(ca_bundle: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_bundle or None)
    except OSError as error:
        refuse(
            "ca_bundle", f"the CA bundle {ca_bundle!r} cannot be used: {error}",
            "name the PEM file of the certificate authority, which the daemon's user may read",
        )  # fmt: skip
