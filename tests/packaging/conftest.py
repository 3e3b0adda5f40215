"""Both wheels, built once, and bare environments on each supported Python to install them into."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.11", "3.12", "3.13")
UV = Path(sys.executable).with_name("uv")


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a command and returns what it printed; its whole output is in the failure."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Wheels:
    daemon: Path
    client: Path


@dataclass(frozen=True)
class Environment:
    """A virtual environment of its own, outside the repository."""

    path: Path
    version: str

    def python(self, code: str) -> str:
        return run(self.path / "bin" / "python", "-I", "-W", "error", "-c", code, cwd=self.path)

    def command(self, *arguments: str) -> str:
        return run(self.path / "bin" / arguments[0], *arguments[1:], cwd=self.path)

    def distributions(self) -> dict[str, str]:
        """Normalised name -> version of what is installed."""
        listed = self.python(
            "from importlib.metadata import distributions\n"
            "for found in distributions(): print(found.metadata['Name'], found.version)"
        )
        pairs = (line.split() for line in listed.splitlines())
        return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    """Built as for a release: a source distribution, and the wheel from that."""
    out = tmp_path_factory.mktemp("wheels")
    for source in (ROOT / "client", ROOT):
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source)
    (client,) = out.glob("cached_client-*.whl")
    (daemon,) = out.glob("cached-*.whl")
    return Wheels(daemon=daemon, client=client)


@cache
def interpreter(version: str) -> str:
    """An interpreter of this version, wherever one is usually found; empty if there is none."""
    return next((found for found in _candidates(version) if _is_python(found, version)), "")


def _candidates(version: str) -> Iterator[str]:
    yield sys.executable
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        yield os.path.join(folder, f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    yield from map(str, sorted(pyenv.glob(f"versions/{version}.*/bin/python"), reverse=True))
    found = subprocess.run(
        [UV, "python", "find", "--no-python-downloads", version], capture_output=True, text=True, check=False
    )
    yield found.stdout.strip()


def _is_python(path: str, version: str) -> bool:
    if not shutil.which(path):
        return False
    code = "import ssl, sqlite3, ctypes, sys; print('{}.{}'.format(*sys.version_info))"
    answer = subprocess.run([path, "-I", "-c", code], capture_output=True, text=True, check=False)
    return answer.stdout.strip() == version


def create_environment(path: Path, version: str, *wheels: Path) -> Environment:
    """Installs the wheels with exactly what they ask for, at the locked versions."""
    found = interpreter(version)
    if not found:
        pytest.skip(f"no Python {version} on this host: the wheels were not tried on it")
    pins = re.findall(r"^([a-z0-9].*?) \\$", (ROOT / "requirements" / "dev.lock").read_text(), re.MULTILINE)
    constraints = path.with_suffix(".constraints")
    constraints.write_text("\n".join(pins) + "\n")
    run(UV, "venv", "--quiet", "--no-project", "--python", found, path)
    python = path / "bin" / "python"
    wanted: list[str | Path] = [*wheels, "--constraint", constraints]
    try:
        run(UV, "pip", "install", "--quiet", "--system-certs", "--python", python, *wanted)
    except AssertionError:
        # uv does not read pip's configuration; where the package index is named only there, pip finds it.
        pip = [sys.executable, "-m", "pip", "--python", python]
        run(*pip, "install", "--quiet", "--disable-pip-version-check", *wanted)
    return Environment(path, version)


@pytest.fixture(scope="session", params=PYTHONS)
def client_environment(
    wheels: Wheels, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Environment:
    return create_environment(tmp_path_factory.mktemp("client") / "venv", request.param, wheels.client)


@pytest.fixture(scope="session", params=PYTHONS)
def daemon_environment(
    wheels: Wheels, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Environment:
    return create_environment(tmp_path_factory.mktemp("daemon") / "venv", request.param, wheels.client, wheels.daemon)
