"""Some hundred histories of each mode, the same history for the same seed, and engines that are broken on purpose."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(400)

_ROOT = Path(__file__).parents[2]
_TIMEOUT_S = 300.0
_BROKEN = """
import os, shutil
import tests.simulator.scale
import gc
from pathlib import Path
from tests.simulator.history import run_one
gc.disable()
{sabotage}
folder = Path(f"/dev/shm/cached-simulator-{{os.getpid()}}")
for seed in range(1, 400):
    _, error = run_one(seed, folder / str(seed), unbounded={unbounded})
    if error is not None:
        print(f"seed {{seed}}: {{type(error).__name__}}: {{error}}", flush=True)
        break
else:
    print("nothing noticed", flush=True)
shutil.rmtree(folder)
os._exit(0)
"""
_UNVERIFIED = """
from cached.transfer import fill
async def taken_for_good(self, index): return True
fill.Fill._confirmed_in_place = taken_for_good
"""
_UNSYNCED = """
from cached.levels import disk
disk.DiskLevel._sync_data = lambda self, ingest_id, path: self.ingest(ingest_id)
"""
_EVICTS_LEASED = """
from cached import leases
leases.LeaseTable.holders = lambda self, name, revision: []
"""


def run(*command: str) -> str:
    """The output of a Python process that runs simulations and must succeed."""
    # A chunk has another size there: it cannot be this process.
    done = subprocess.run(
        [sys.executable, *command], cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
        env={"PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mode", [(), ("--unbounded",)])
def test_histories_keep_every_promise(mode):
    told = run("-m", "tests.simulator", "--histories", "30", *mode)
    assert "30 histories" in told
    assert " 0 failed" in told


@pytest.mark.parametrize("mode", [(), ("--unbounded",)])
def test_the_same_seed_is_the_same_history(mode):
    first, second = (run("-m", "tests.simulator", "--seed", "7", "--verbose", *mode) for _ in range(2))
    found = [re.search(r"fingerprint (\w+)", told) for told in (first, second)]
    assert found[0] is not None
    assert found[1] is not None
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize(
    ("sabotage", "unbounded"),
    [
        pytest.param(_UNVERIFIED, True, id="no checksum of what is in place"),
        pytest.param(_UNSYNCED, True, id="no fsync"),
        pytest.param(_EVICTS_LEASED, False, id="leases are ignored"),
    ],
)
def test_an_engine_that_breaks_a_promise_is_noticed(sabotage, unbounded):
    told = run("-c", _BROKEN.format(sabotage=sabotage, unbounded=unbounded))
    assert "Violation" in told, told
    seed = told.split(":")[0].removeprefix("seed ")
    intact = run("-m", "tests.simulator", "--seed", seed, *(["--unbounded"] if unbounded else []))
    assert " 0 failed" in intact, "it is the sabotage that was noticed"
