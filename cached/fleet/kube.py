"""The few requests to Kubernetes' API that the fleet needs. The only user of the ``kubernetes`` library.

The library finds the server and shows our credentials (a pod's service account, whose token changes, or a kubeconfig).
Bodies are plain JSON: its classes would write times in a form that the server does not take without fractions.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cached.errors import ClusterError, ConfigError

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_TIMEOUT_S = (2.0, 4.0)
_MOST_S = 60.0


class KubeError(ClusterError):
    """The API could not be asked, or refused. ``status`` 0: no answer at all."""

    def __init__(self, message: str, *, status: int = 0, retry_after_s: float = 0.0) -> None:
        hint = "see what the service account may do, and whether the API answers: kubectl auth can-i --list"
        super().__init__(message, hint=hint, status=status)
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def is_conflict(self) -> bool:
        """Somebody else changed it since it was read, or made it before."""
        return self.status == 409


@dataclass(frozen=True, slots=True)
class LeaseState:
    """A Lease as it was read. ``version``: changes with every write; empty for one that is to be made."""

    holder: str = ""
    duration_s: int = 0
    renewed: str = ""
    transitions: int = 0
    version: str = ""


def require_library(key: str) -> None:
    """Raises ConfigError, naming the setting that needs it, where the library is not installed."""
    if importlib.util.find_spec("kubernetes") is None:
        raise ConfigError(
            f"{key} needs the Kubernetes client, which is not installed",
            hint="pip install 'cached[kubernetes]', or leave the setting out",
            file="", key=key, value="",
        )  # fmt: skip


class KubeApi:
    """Blocks; call in a thread. Connects with the first request, and anew with the next one after it could not."""

    def __init__(self, node_name: str, namespace: str) -> None:
        """Empty ``node_name``: this host's. Empty ``namespace``: the pod's, else default."""
        self.node_name = node_name or os.uname().nodename
        self._namespace = namespace
        self._opened: tuple[Any, Any] | None = None

    def node_labels(self) -> dict[str, str]:
        """Of this daemon's node. Raises KubeError."""
        labels = self._ask("GET", self._node_path()).get("metadata", {}).get("labels")
        return {str(key): str(value) for key, value in (labels or {}).items()}

    def patch_labels(self, changes: Mapping[str, str | None]) -> None:
        """Sets these labels of the node; None removes one. No other label is touched. Raises KubeError."""
        body = {"metadata": {"labels": dict(changes)}}
        self._ask("PATCH", self._node_path(), body, content_type="application/merge-patch+json")

    def lease(self, name: str) -> LeaseState | None:
        """The Lease, or None if there is none. Raises KubeError."""
        try:
            return _state(self._ask("GET", f"{self._leases_path()}/{name}"))
        except KubeError as error:
            if error.status == 404:
                return None
            raise

    def write_lease(self, name: str, state: LeaseState) -> LeaseState:
        """Makes it, or replaces the version that ``state`` names, as renewed now. Raises KubeError."""
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        spec: dict[str, Any] = {
            "leaseDurationSeconds": state.duration_s, "leaseTransitions": state.transitions, "renewTime": now,
        }  # fmt: skip
        if state.holder:
            spec["holderIdentity"] = state.holder
        metadata = {"name": name, "namespace": self.namespace}
        body: dict[str, Any] = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "spec": spec}
        if not state.version:
            return _state(self._ask("POST", self._leases_path(), body | {"metadata": metadata}))
        body["metadata"] = metadata | {"resourceVersion": state.version}
        return _state(self._ask("PUT", f"{self._leases_path()}/{name}", body))

    @property
    def namespace(self) -> str:
        """Where the Leases are."""
        if not self._namespace:
            try:
                self._namespace = _NAMESPACE_FILE.read_text(encoding="ascii").strip() or "default"
            except OSError:
                self._namespace = "default"
        return self._namespace

    def _node_path(self) -> str:
        return f"/api/v1/nodes/{quote(self.node_name, safe='')}"

    def _leases_path(self) -> str:
        return f"/apis/coordination.k8s.io/v1/namespaces/{quote(self.namespace, safe='')}/leases"

    def _ask(
        self, method: str, path: str, body: object = None, content_type: str = "application/json"
    ) -> dict[str, Any]:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": "cached"}
        try:
            configuration, client = self._opened = self._opened or _open()
            for setting in configuration.auth_settings().values():
                headers[setting["key"]] = setting["value"]
        except Exception as error:  # files, YAML and programs of a kubeconfig can be wrong in every way
            raise KubeError(f"nothing says where the Kubernetes API is, or who we are: {error}") from error
        try:
            answer = client.request(
                method, configuration.host + path, headers=headers, body=body, _request_timeout=_TIMEOUT_S
            )
            data = answer.read() if hasattr(answer, "read") else answer.data
        except (HTTPError, OSError) as error:
            self._opened = None
            raise KubeError(f"the Kubernetes API could not be reached: {error}") from error
        except ApiException as error:
            raise _refused(method, path, error.status or 0, error.headers or {}, str(error.reason)) from error
        if not 200 <= answer.status < 300:
            raise _refused(method, path, answer.status, answer.getheaders(), _told(data))
        try:
            found = json.loads(data)
        except ValueError as error:
            raise KubeError(f"{method} {path}: the answer is no JSON") from error
        return found if isinstance(found, dict) else {}


def _open() -> tuple[Any, Any]:
    from kubernetes.client import Configuration
    from kubernetes.client.rest import RESTClientObject
    from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

    configuration = Configuration()
    try:
        load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    except ConfigException:
        load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
    configuration.retries = False  # whoever asks waits and tries again by itself
    return configuration, RESTClientObject(configuration)


def _state(data: Mapping[str, Any]) -> LeaseState:
    spec = data.get("spec") or {}
    return LeaseState(
        holder=str(spec.get("holderIdentity") or ""),
        duration_s=int(spec.get("leaseDurationSeconds") or 0),
        renewed=str(spec.get("renewTime") or ""),
        transitions=int(spec.get("leaseTransitions") or 0),
        version=str((data.get("metadata") or {}).get("resourceVersion") or ""),
    )


def _refused(method: str, path: str, status: int, headers: Mapping[str, Any], why: str) -> KubeError:
    try:
        retry_after_s = min(_MOST_S, float(headers.get("Retry-After") or 0))
    except ValueError:
        retry_after_s = 0.0
    return KubeError(f"{method} {path}: {status} {why}".strip(), status=status, retry_after_s=retry_after_s)


def _told(data: bytes | str) -> str:
    """The message of a Status object, else the beginning of what came."""
    try:
        return str(json.loads(data)["message"])[:300]
    except (ValueError, KeyError, TypeError):
        return str(data[:200])
