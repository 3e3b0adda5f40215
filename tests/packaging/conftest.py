"""Both wheels, built once, and bare environments to install them into."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


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
    out = tmp_path_factory.mktemp("wheels")
    for source in (ROOT / "client", ROOT):
        run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, source)
    (client,) = out.glob("cached_client-*.whl")
    (daemon,) = out.glob("cached-*.whl")
    return Wheels(daemon=daemon, client=client)


def create_environment(path: Path, *wheels: Path) -> Environment:
    """Installs the wheels with exactly what they ask for, at the locked versions."""
    pins = re.findall(r"^([a-z0-9].*?) \\$", (ROOT / "requirements" / "dev.lock").read_text(), re.MULTILINE)
    constraints = path.with_suffix(".constraints")
    constraints.write_text("\n".join(pins) + "\n")
    run(sys.executable, "-m", "venv", path)
    python = path / "bin" / "python"
    uv = Path(sys.executable).with_name("uv")
    wanted: list[str | Path] = [*wheels, "--constraint", constraints]
    try:
        run(uv, "pip", "install", "--quiet", "--system-certs", "--python", python, *wanted)
    except AssertionError:
        # uv does not read pip's configuration; where the package index is named only there, pip finds it.
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted)
    return Environment(path)


@pytest.fixture(scope="session")
def client_environment(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return create_environment(tmp_path_factory.mktemp("client") / "venv", wheels.client)


@pytest.fixture(scope="session")
def daemon_environment(wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return create_environment(tmp_path_factory.mktemp("daemon") / "venv", wheels.client, wheels.daemon)
