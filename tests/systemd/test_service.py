"""The unit under a real systemd; `make test-systemd`."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.integration.support import model_files, sha256
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
    model, web = (
        lay(tmp_path / "model", model_files(60_000_000)),
        lay(tmp_path / "web", model_files(10_000_000, seed=2)),
    )
    sums = [f"{sha256(path.read_bytes())}  {path.name}\n" for path in sorted(web.iterdir())]
    (web / "SHA256SUMS").write_text("".join(sums))
    scenario = Path(__file__).with_name("scenario.py")
    told = run_scenario(tmp_path, scenario, {"/opt/cached": installation, "/srv/m": model, "/srv/web": web})
    print(told)
    assert told.endswith("=== done\n")


def lay(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder
