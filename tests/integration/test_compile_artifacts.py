"""A real compiler's cache, restored: the second start compiles nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support import ROOT, Site


def start(site: Site, folder: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.compile_worker", str(site.daemon.socket), str(folder), *flags]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no pool of processes for one small graph
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["equal"], "what was compiled computes something else"
    return told


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_restored_start_of_torch_compile_compiles_nothing(site: Site, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler for the CPU: g++ or clang++")
    site.settings["artifacts"] = {"save": True}
    site.start()
    first = start(site, tmp_path / "first")
    assert (first["restored"], first["saved"]) == ("Missed", "stored")
    assert (first["misses"], first["hits"]) == (1, 0)
    second = start(site, tmp_path / "elsewhere")
    assert (second["restored"], second["saved"]) == ("Restored", "")
    assert (second["misses"], second["hits"]) == (0, 1), (
        "everything comes out of the cache, though its folder is another"
    )
