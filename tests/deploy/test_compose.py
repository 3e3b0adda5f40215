"""The compose file: what it says, and what the daemon makes of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from cached.catalog_file import load_catalog
from cached.config import Place, load_config
from cached.setting_checks import resolve_capacity
from cached.units import parse_size

FILE = Path(__file__).resolve().parents[2] / "deploy" / "compose" / "compose.yaml"
SERVICES = yaml.safe_load(FILE.read_text())["services"]


def docker_compose() -> list[str]:
    """The command, if one is here: the plugin of Docker's client, or the program by itself."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            return command
    return []


@pytest.mark.skipif(not docker_compose(), reason="Docker Compose is not installed")
def test_docker_compose_accepts_it():
    done = subprocess.run([*docker_compose(), "-f", FILE, "config", "--quiet"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_daemon_accepts_its_settings():
    daemon = SERVICES["cached"]
    environment = {key: str(value) for key, value in daemon["environment"].items()}
    config = load_config(
        None, environment, {}, Place(uid=9470, run_dir_writable=True, config_file="/nonexistent")
    ).config
    l1 = parse_size(config.l1.capacity)
    needed = l1 + resolve_capacity(config.l1.transient_capacity, l1)
    assert needed < parse_size(daemon["shm_size"]) < parse_size(daemon["mem_limit"])
    assert int(daemon["stop_grace_period"].removesuffix("s")) >= config.daemon.drain_timeout_s + 35
    targets = {volume.split(":")[1] for volume in daemon["volumes"]}
    assert config.daemon.catalog.rpartition("/")[0] in targets
    assert config.daemon.socket.rpartition("/")[0] in targets
    assert config.daemon.state_dir in targets
    load_catalog(FILE.parent / "catalog" / "catalog.json")


def test_the_worker_shares_the_sockets_and_nothing_else_with_the_daemon():
    worker, daemon = SERVICES["worker"], SERVICES["cached"]
    named = [{volume.split(":")[0] for volume in service["volumes"]} for service in (worker, daemon)]
    assert named[0] & named[1] == {"sockets"}
    assert "sockets:/run/cached:ro" in worker["volumes"]
    assert worker["group_add"] == ["9470"]
    assert not set(worker["networks"]) & set(daemon["networks"])
    assert not {"ipc", "pid", "privileged", "network_mode"} & {key for service in SERVICES.values() for key in service}


def test_files_that_are_mounted_are_there():
    for service in SERVICES.values():
        for volume in service["volumes"]:
            if volume.startswith("."):
                assert (FILE.parent / volume.split(":")[0]).exists(), volume
