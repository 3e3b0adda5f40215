"""Runs containers of rendered pods on this host, as far as that goes without a kubelet.

Each container gets mount, pid and IPC namespaces of its own; a root that is read-only and holds this host's programs
in place of the image's; the volumes that its manifest mounts, and no others; its user, groups and capabilities, its
command and environment. What it does not get: a network of its own, cgroups, seccomp, and an image.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
_PROGRAMS = ("/bin", "/lib", "/lib32", "/lib64", "/libx32", "/sbin", "/usr")
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
_DEVICES = ("null", "zero", "full", "random", "urandom")

Manifest = dict[str, Any]


def why_not() -> str:
    """Why containers cannot be run here; empty if they can."""
    if os.geteuid() != 0:
        return "containers of pods are run by root only"
    done = subprocess.run(["unshare", "--mount", "--pid", "--ipc", "--fork", "true"], capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class Node:
    """A node of a cluster: its folders, and the ConfigMaps and Secrets of the cluster. ``close`` removes all of it."""

    folder: Path
    objects: dict[tuple[str, str], Mapping[str, str]] = field(default_factory=dict)
    """(kind, name) → data."""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.memory = Path("/dev/shm") / f"node-{secrets.token_hex(8)}"
        """Where the node's /dev/shm is: a folder in a real one."""

    def host_path(self, path: str) -> Path:
        """Where a folder of the node really is."""
        if path.startswith("/dev/shm"):
            return self.memory / path.removeprefix("/dev/shm").lstrip("/")
        return self.folder / path.lstrip("/")

    def apply(self, manifests: Sequence[Manifest]) -> None:
        """Takes over the ConfigMaps; folders that pods have of them change as the kubelet changes them."""
        for manifest in manifests:
            if manifest["kind"] in ("ConfigMap", "Secret"):
                self.put(manifest["kind"], manifest["metadata"]["name"], manifest["data"])

    def put(self, kind: str, name: str, data: Mapping[str, str]) -> None:
        self.objects[kind, name] = data
        if (folder := self._projected(kind, name)).exists():
            _write_as_kubelet(folder, data)

    def volume(self, spec: Manifest, scratch: Path) -> Path:
        """The folder behind a volume of a pod."""
        if "hostPath" in spec:
            path = self.host_path(spec["hostPath"]["path"])
            if spec["hostPath"]["type"] == "DirectoryOrCreate":
                path.mkdir(parents=True, exist_ok=True, mode=0o755)
            assert path.is_dir(), f"the kubelet would not start this pod: there is no folder {spec['hostPath']['path']}"
            return path
        if "emptyDir" in spec:
            in_memory = spec["emptyDir"].get("medium") == "Memory"
            path = (self.memory / scratch.name if in_memory else scratch) / spec["name"]
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o777)
            return path
        kind, name = (
            ("ConfigMap", spec["configMap"]["name"])
            if "configMap" in spec
            else ("Secret", spec["secret"]["secretName"])
        )
        folder = self._projected(kind, name)
        if not folder.exists():
            _write_as_kubelet(folder, self.objects[kind, name])
        return folder

    def _projected(self, kind: str, name: str) -> Path:
        return self.folder / "kubelet" / kind / name

    def close(self) -> None:
        shutil.rmtree(self.memory, ignore_errors=True)


def _write_as_kubelet(folder: Path, data: Mapping[str, str]) -> None:
    """Files that are links through ..data, which is exchanged by a rename: see atomic_writer.go of Kubernetes."""
    folder.mkdir(parents=True, exist_ok=True)
    current = folder / "..data"
    old = folder / os.readlink(current) if current.is_symlink() else None
    fresh = folder / f"..{len(list(folder.iterdir()))}"
    fresh.mkdir()
    for key, text in data.items():
        (fresh / key).write_text(text)
        if not (folder / key).is_symlink():
            (folder / key).symlink_to(f"..data/{key}")
    (folder / "..data_tmp").symlink_to(fresh.name)
    (folder / "..data_tmp").rename(current)
    if old is not None:
        shutil.rmtree(old)


class Container:
    """One container of a pod, started. Leaving the context kills it."""

    def __init__(
        self, node: Node, pod: Manifest, name: str, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        spec = next(item for item in [*pod.get("initContainers", ()), *pod["containers"]] if item["name"] == name)
        scratch.mkdir(parents=True, exist_ok=True)
        self.log_file = scratch / f"{name}.log"
        script = "\n".join(["set -eu", *_root(node, pod, spec, scratch), _enter(pod, spec, scratch, environment or {})])
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "--propagation=private", "--pid", "--ipc", "--fork",
                 "/bin/sh", "-c", script],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": _PATH},
            )  # fmt: skip

    def log(self) -> str:
        return self.log_file.read_text()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit status."""
        return self._process.wait(timeout_s)

    def terminate(self) -> int:
        """As the kubelet does: SIGTERM to its first process, and its exit status."""
        self._signal(signal.SIGTERM)
        return self.wait()

    def _signal(self, number: int) -> None:
        """To its first process; unshare itself only waits for that."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended by itself
            for first in Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split():
                os.kill(int(first), number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, and with its first process everything in it; idempotent."""
        if self.is_running:
            self._signal(signal.SIGKILL)
            self._process.kill()
        self._process.wait()


def _root(node: Node, pod: Manifest, spec: Manifest, scratch: Path) -> Iterator[str]:
    """Commands that build the container's root in a tmpfs, and make it read-only."""
    root = scratch / "root"
    root.mkdir(exist_ok=True)
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    yield f"mount -t tmpfs -o mode=0755 root {root}"
    yield f"mkdir -p {root}/proc {root}/dev {root}/etc {root}/tmp && mount -t proc proc {root}/proc"
    for name in _DEVICES:
        yield f": > {root}/dev/{name} && mount --bind /dev/{name} {root}/dev/{name}"
    yield f"printf '127.0.0.1 localhost\\n' > {root}/etc/hosts; cp -rL /etc/ssl {root}/etc/ 2>/dev/null || :"
    for path in _PROGRAMS:
        if os.path.islink(path):
            yield f"ln -s {os.readlink(path)} {root}{path}"
        elif os.path.isdir(path):
            yield _bound(path, root, read_only=True)
    for mount in spec["volumeMounts"]:
        source = node.volume(volumes[mount["name"]], scratch)
        yield _bound(str(source), root, mount["mountPath"], read_only=mount.get("readOnly", False))
    # Last, as the checkout may lie below a folder that the pod has a volume for.
    for path in sorted({str(ROOT), sys.prefix, sys.base_prefix}):
        if not path.startswith("/usr"):
            yield _bound(path, root, read_only=True)
    if spec["securityContext"]["readOnlyRootFilesystem"]:
        yield f"mount -o remount,ro {root}"


def _bound(source: str, root: Path, target: str = "", *, read_only: bool) -> str:
    place = f"{root}{target or source}"
    command = f"mkdir -p {place} && mount --bind {source} {place}"
    return f"{command} && mount -o remount,bind,ro {place}" if read_only else command


def _enter(pod: Manifest, spec: Manifest, scratch: Path, environment: Mapping[str, str]) -> str:
    """The command that becomes the container's first process."""
    security = {**pod.get("securityContext", {}), **spec["securityContext"]}
    kept = "".join(f",+{name.lower()}" for name in security["capabilities"].get("add", ()))
    assert security["capabilities"]["drop"] == ["ALL"]
    assert security["allowPrivilegeEscalation"] is False
    groups = ",".join(
        str(gid)
        for gid in [*security.get("supplementalGroups", ()), *([security["fsGroup"]] if "fsGroup" in security else ())]
    )
    command = [*spec.get("command", ["cached"]), *spec.get("args", ())]
    variables = {"PATH": f"{sys.prefix}/bin:{_PATH}", "PYTHONPATH": str(ROOT)}
    variables |= {item["name"]: item["value"] for item in spec.get("env", ()) if "value" in item} | dict(environment)
    words = [
        "exec", "chroot", str(scratch / "root"),
        "setpriv", f"--reuid={security['runAsUser']}", f"--regid={security['runAsGroup']}",
        f"--groups={groups}" if groups else "--clear-groups",
        f"--bounding-set=-all{kept}", "--inh-caps=-all", "--no-new-privs",
        "env", "-i", *(f"{name}={value}" for name, value in variables.items()), *command,
    ]  # fmt: skip
    return shlex.join(words)
