"""As much of Kubernetes' API as the fleet uses, over real HTTP: nodes (GET, merge PATCH) and Leases (GET, POST, PUT).

No API server can be installed here, so this is our reading of its documented behaviour: optimistic locking by
resourceVersion (409), bearer tokens (401), RBAC as a list of what is refused (403), throttling (429 with Retry-After),
validation of label keys and values and of MicroTime (422), unknown media types (415).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

TOKEN = "token-of-the-test"
_NODE = re.compile(r"/api/v1/nodes/([^/?]+)")
_LEASES = re.compile(r"/apis/coordination\.k8s\.io/v1/namespaces/([^/?]+)/leases(?:/([^/?]+))?")
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_PREFIX = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")


@dataclass(eq=False)
class Refusal:
    """Requests of this method whose path has ``path`` are answered so, ``times`` times (< 0: always)."""

    status: int
    method: str = ""
    path: str = ""
    times: int = -1
    retry_after_s: int = 0
    hits: int = 0


@dataclass
class KubeServer:
    """``with KubeServer() as kube``, then a kubeconfig by ``write_config``."""

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    leases: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    refusals: list[Refusal] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    version: int = 100

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.kube = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def write_config(self, path: Path, *, token: str = TOKEN, url: str = "") -> Path:
        """A kubeconfig that leads here."""
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url or self.url}}],
            "users": [{"name": "test", "user": {"token": token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        }  # fmt: skip
        path.write_text(json.dumps(config))
        return path

    def add_node(self, name: str, **labels: str) -> None:
        self.nodes[name] = {"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}}}

    def labels(self, node: str, prefix: str = "") -> dict[str, str]:
        """Of a node those that have ``prefix`` in their keys."""
        with self.lock:
            return {key: value for key, value in self.nodes[node]["metadata"]["labels"].items() if prefix in key}

    def hold(self, name: str, holder: str, namespace: str = "default", duration_s: int = 60) -> None:
        """Writes a Lease as another host would."""
        spec = {"holderIdentity": holder, "leaseDurationSeconds": duration_s, "leaseTransitions": 0}
        with self.lock:
            self._put(namespace, name, spec | {"renewTime": f"2026-01-01T00:00:00.{self.version:06}Z"})

    def holder(self, name: str, namespace: str = "default") -> str:
        with self.lock:
            return str(self.leases.get((namespace, name), {}).get("spec", {}).get("holderIdentity") or "")

    @contextmanager
    def refusing(self, status: int, **settings: Any) -> Iterator[Refusal]:
        refusal = Refusal(status, **settings)
        self.refusals.append(refusal)
        try:
            yield refusal
        finally:
            self.refusals.remove(refusal)

    def _put(self, namespace: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
        self.version += 1
        made = {
            "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec,
            "metadata": {"name": name, "namespace": namespace, "resourceVersion": str(self.version)},
        }  # fmt: skip
        self.leases[namespace, name] = made
        return made

    def answer(self, method: str, path: str, body: Any, media_type: str) -> tuple[int, dict[str, Any]]:
        """Status and object."""
        if node := _NODE.fullmatch(path):
            return self._node(method, node[1], body, media_type)
        if lease := _LEASES.fullmatch(path):
            return self._lease(method, lease[1], lease[2], body)
        return _status(404, f"the server could not find {path}")

    def _node(self, method: str, name: str, body: Any, media_type: str) -> tuple[int, dict[str, Any]]:
        node = self.nodes.get(name)
        if node is None:
            return _status(404, f'nodes "{name}" not found')
        if method == "GET":
            return 200, node
        if method != "PATCH" or media_type != "application/merge-patch+json":
            return _status(415 if method == "PATCH" else 405, f"not supported: {method} {media_type}")
        changes = body["metadata"]["labels"]
        for key, value in changes.items():
            prefix, _, label = key.rpartition("/")
            bad = not _NAME.fullmatch(label) or (prefix and (len(prefix) > 253 or not _PREFIX.fullmatch(prefix)))
            if bad or (value and not _NAME.fullmatch(value)):
                return _status(422, f"metadata.labels: Invalid value: {key!r}: {value!r}")
        labels = node["metadata"]["labels"] | changes
        node["metadata"]["labels"] = {key: value for key, value in labels.items() if value is not None}
        return 200, node

    def _lease(self, method: str, namespace: str, name: str | None, body: Any) -> tuple[int, dict[str, Any]]:
        found = self.leases.get((namespace, name or ""))
        if method == "GET" and name:
            return (200, found) if found else _status(404, f'leases "{name}" not found')
        if method not in {"POST", "PUT"}:
            return _status(405, "not supported")
        spec, metadata = body["spec"], body["metadata"]
        if spec["leaseDurationSeconds"] <= 0 or not _MICRO_TIME.fullmatch(spec["renewTime"]):
            return _status(422, f"spec: Invalid value: {spec}")
        if method == "POST":
            if (namespace, metadata["name"]) in self.leases:
                return _status(409, f'leases "{metadata["name"]}" already exists')
            return 201, self._put(namespace, metadata["name"], spec)
        if found is None:
            return _status(404, f'leases "{name}" not found')
        if metadata.get("resourceVersion") != found["metadata"]["resourceVersion"]:
            return _status(409, "the object has been modified; please apply your changes to the latest version")
        return 200, self._put(namespace, metadata["name"], spec)


def _status(code: int, message: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    kube: KubeServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        kube = self.server.kube
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers: dict[str, str] = {}
        with kube.lock:
            kube.requests.append((self.command, self.path))
            refusal = self._refusal()
            if refusal is not None:
                refusal.times -= 1
                refusal.hits += 1
                status, found = _status(refusal.status, "as told by the test")
                headers = {"Retry-After": str(refusal.retry_after_s)} if refusal.retry_after_s else {}
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = _status(401, "Unauthorized")
            else:
                media_type = self.headers.get("Content-Type", "")
                status, found = kube.answer(self.command, self.path, json.loads(data) if data else None, media_type)
            text = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(text))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def _refusal(self) -> Refusal | None:
        for item in self.server.kube.refusals:
            if item.times and item.method in {"", self.command} and item.path in self.path:
                return item
        return None

    do_GET = do_POST = do_PUT = do_PATCH = _serve  # noqa: N815 names of http.server
