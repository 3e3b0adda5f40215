"""The unit under a real systemd; `make test-systemd`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.support import model_files
from tests.packaging.conftest import ROOT, UV, run
from tests.systemd.container import missing, run_scenario

pytestmark = [pytest.mark.systemd, pytest.mark.timeout(600)]

SYSTEM_PYTHON = "/usr/bin/python3"
"""Of the distribution: one below /home or /root is not seen by the service."""


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What will be /opt/cached: an environment that may be moved, with both wheels."""
    if reason := missing():
        pytest.skip(f"the unit was not run under systemd: {reason}")
    code = "import sys; sys.exit(sys.version_info < (3, 11))"
    if subprocess.run([SYSTEM_PYTHON, "-c", code]).returncode:
        pytest.skip(f"the unit was not run under systemd: {SYSTEM_PYTHON} is older than 3.11")
    path = tmp_path_factory.mktemp("opt") / "cached"
    run(UV, "venv", "--quiet", "--no-project", "--relocatable", "--python", SYSTEM_PYTHON, path)
    python = path / "bin" / "python"
    run(
        UV,
        "pip",
        "install",
        "--quiet",
        "--system-certs",
        "--link-mode",
        "copy",
        "--python",
        python,
        ROOT / "client",
        ROOT,
    )
    return path


def test_an_administrators_day_with_the_service(installation: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for name, data in model_files(60_000_000).items():
        (model / name).write_bytes(data)
    scenario = Path(__file__).with_name("scenario.py")
    told = run_scenario(tmp_path, scenario, {"/opt/cached": installation, "/srv/m": model})
    assert told.endswith("=== done\n"), told
    print(told)
