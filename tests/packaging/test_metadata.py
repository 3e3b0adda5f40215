"""Versions, locks and what an import costs."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cached
from cached_client._version import __version__ as client_version

ROOT = Path(__file__).resolve().parents[2]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def project(path: str) -> dict:
    return tomllib.loads((ROOT / path).read_text())["project"]


def test_both_distributions_have_one_version() -> None:
    assert cached.__version__ == client_version
    assert metadata.version("cached") == metadata.version("cached-client") == cached.__version__


def test_daemon_asks_for_the_client_of_its_own_version() -> None:
    assert f"cached-client=={cached.__version__}" in project("pyproject.toml")["dependencies"]


def test_the_changelog_has_a_section_of_this_version() -> None:
    assert f"\n## [{cached.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_lock_holds_pins_and_hashes_and_no_address(lock: Path) -> None:
    text = lock.read_text()
    assert "://" not in text
    lines = [line.strip() for line in text.splitlines()]
    pins = [line for line in lines if not line.startswith("--hash=sha256:")]
    for pin in pins:
        assert re.match(r"^[a-z0-9-]+(\[[a-z0-9,-]+\])?==[^ ]+( ; .+)? \\$", pin), pin
    assert text.count("--hash=sha256:") >= len(pins)


def test_lock_holds_every_direct_dependency() -> None:
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements" / "dev.lock").read_text(), re.MULTILINE))
    wanted = project("pyproject.toml")["dependencies"] + project("client/pyproject.toml")["dependencies"]
    wanted += [
        line
        for line in (ROOT / "requirements" / "dev.in").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    names = {canonicalize_name(Requirement(line).name) for line in wanted} - {"cached-client"}
    assert names <= locked


@pytest.mark.parametrize("distribution", ["cached", "cached-client"])
def test_installed_versions_satisfy_what_the_distribution_asks_for(distribution: str) -> None:
    for line in metadata.requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert metadata.version(requirement.name) in requirement.specifier, line


def test_importing_the_client_is_cheap() -> None:
    """The development environment has all of these, so only what the client does itself keeps them out."""
    code = "import sys, cached_client; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "cached_client" in loaded
    assert not loaded & {"numpy", "torch", "safetensors", "transformers", "boto3", "diskcache", "aiohttp", "cached"}
