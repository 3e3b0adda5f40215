"""A standalone pull, killed just before or after its Nth step: nothing wrong is ever laid; the next one completes it.

``CRASH_STEPS=n`` makes it longer, ``CRASH_STEP=n`` repeats a step.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest

from cached.units import CHUNK_BYTES
from tests.integration.support import MB, ROOT, Site, model_files, sha256
from tests.integration.test_standalone import check_laid, command, laid, lay

STEPS = int(os.environ.get("CRASH_STEPS", "3"))
SEED = int(os.environ.get("CRASH_SEED", "1"))
NEVER = 0


def killed_at(site: Site, step: int) -> list[str]:
    """The steps that were taken until then."""
    trace = site.folder / "trace"
    words = command(site, "m", site.folder / "seed")
    subprocess.run(
        [sys.executable, "-m", "tests.crash.kill_at_step", str(step), str(trace), *words[words.index("pull") :]],
        cwd=ROOT, env=os.environ | site.environment(), capture_output=True, timeout=120,
    )  # fmt: skip
    return trace.read_text().splitlines()


@pytest.mark.timeout(120 + 30 * STEPS)
def test_killed_at_any_step_it_lays_the_right_files_in_the_end(site: Site, fault_point: Callable[[str], None]) -> None:
    old = model_files(CHUNK_BYTES + MB, seed=1)
    site.add("m", old)
    lay(site, "m", site.folder / "before")
    new = model_files(MB, 2 * MB, seed=2)
    site.add("m", new, sha256={path: sha256(data) for path, data in new.items()}, exclude=["model.safetensors"])
    shutil.copytree(site.folder / "before", site.folder / "seed")
    count = len(killed_at(site, NEVER))
    check_laid(site.folder / "seed", new)
    chance = random.Random(SEED)
    chosen = (
        [int(os.environ["CRASH_STEP"])]
        if "CRASH_STEP" in os.environ
        else sorted(chance.sample(range(1, count + 1), min(STEPS, count)))
    )
    for step in chosen:
        shutil.rmtree(site.folder / "seed")
        shutil.copytree(site.folder / "before", site.folder / "seed")
        steps = killed_at(site, step)
        there = laid(site.folder / "seed")
        assert all(data in {old.get(path), new.get(path)} for path, data in there.items()), f"CRASH_STEP={step}"
        lay(site, "m", site.folder / "seed")
        check_laid(site.folder / "seed", new)
        fault_point(f"standalone, step {step}: {steps[-1].partition(' ')[2]}")
