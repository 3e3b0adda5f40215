"""Rendered manifests, as the tests look at them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from cached.config import Config, Place, load_config
from cached.settings import sections
from cached.units import parse_size
from deploy.tools import CHART, KUSTOMIZE, kubectl, template

Manifest = dict[str, Any]

OVERLAYS = ("base", *sorted(f"overlays/{path.name}" for path in (KUSTOMIZE / "overlays").iterdir()))
EXAMPLES = "examples"
CI_VALUES = sorted((CHART / "ci").glob("*.yaml"))
CUSTOM = {"PodMonitor"}
"""Kinds of others, whose schema Kubernetes does not have."""
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Ten times as fast where libyaml is there."""


def parsed(text: str) -> list[Manifest]:
    return [manifest for manifest in yaml.load_all(text, Loader=_LOADER) if manifest]


@cache
def kustomized(name: str) -> str:
    return kubectl("kustomize", KUSTOMIZE / name)


@cache
def charted(values: Path | None = None, *settings: str) -> str:
    """The chart with a file of values, and ``--set`` of each setting."""
    files = ("--values", values) if values else ()
    return template(*files, *(word for setting in settings for word in ("--set-json", setting)))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def one(manifests: list[Manifest], kind: str, name: str = "") -> Manifest:
    (found,) = [item for item in of_kind(manifests, kind) if name in ("", item["metadata"]["name"])]
    return found


def pods(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Everything that makes pods, each with the pod's spec."""
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest, manifest["spec"]
        elif "template" in manifest.get("spec", {}):
            yield manifest, manifest["spec"]["template"]["spec"]


def containers(pod: Manifest) -> list[Manifest]:
    return [*pod.get("initContainers", ()), *pod["containers"]]


def daemon_of(manifests: list[Manifest]) -> tuple[Manifest, Manifest]:
    """The daemon's pod and container."""
    pod = one(manifests, "DaemonSet")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def quantity(text: str) -> int:
    """Bytes of ``16Gi``."""
    return parse_size(f"{text}B")


def config_text(manifests: list[Manifest]) -> str:
    """config.toml from the ConfigMap that the daemon's pod mounts."""
    pod, _ = daemon_of(manifests)
    (name,) = [volume["configMap"]["name"] for volume in pod["volumes"] if volume["name"] == "config"]
    text: str = one(manifests, "ConfigMap", name)["data"]["config.toml"]
    return text


def config_of(manifests: list[Manifest], folder: Path) -> Config:
    """What the daemon itself makes of the ConfigMap and of the container's environment."""
    file = folder / "config.toml"
    file.write_text(config_text(manifests))
    _, container = daemon_of(manifests)
    if "fleet" not in sections() and ("[fleet]" in file.read_text() or "CACHED_FLEET_SLOTS" in str(container["env"])):
        pytest.skip("this version has no fleet settings")
    environment = {item["name"]: item.get("value", "from-the-pod") for item in container["env"]}
    return load_config(file, environment, {}, Place(uid=9470, run_dir_writable=True)).config
