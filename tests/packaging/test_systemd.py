from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from cached.config import Config, Place, load_config

FOLDER = Path(__file__).parents[2] / "systemd"
UNIT = (FOLDER / "cached.service").read_text()
needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


@pytest.fixture
def unit(tmp_path):
    """The unit, with a program that is there."""
    file = tmp_path / "cached.service"
    file.write_text(UNIT.replace("/usr/bin/cached", "/bin/true"))
    return file


def setting(name):
    return re.findall(rf"(?m)^{name}=(.*)$", UNIT)[0]


@needs_systemd
def test_the_unit_is_valid(unit):
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
    assert "cached.service" not in done.stderr
    assert done.returncode == 0, done.stderr


@needs_systemd
def test_the_unit_is_a_sandbox(unit):
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_units_folders_are_those_of_a_system_daemon():
    env = {"STATE_DIRECTORY": f"/var/lib/{setting('StateDirectory')}"}  # as systemd sets it
    config = load_config(None, env, {}, Place(uid=990, run_dir_writable=True, config_file="/nonexistent")).config
    assert config.daemon.socket == f"/run/{setting('RuntimeDirectory')}/cached.sock"
    assert config.daemon.state_dir == "/var/lib/cached"
    assert int(setting("TimeoutStopSec")) > Config().daemon.drain_timeout_s


def test_the_units_user_is_the_one_that_is_made():
    assert re.search(rf"(?m)^u {setting('User')} ", (FOLDER / "sysusers.conf").read_text())
