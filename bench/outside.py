"""Caches of others over a trace of attaches, L1 alone: what libcachesim's policies would have made users wait."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from cached.level import Level
from cached.simulate import Row, Setup

POLICIES = ("LRU", "ARC", "LeCaR", "Sieve", "S3FIFO", "LHD", "GDSF", "LRUK")
_ROOT = Path(__file__).resolve().parents[1]
_TIMEOUT_S = 120.0
_MB = 10**6


def cold_start_share(setup: Setup, rows: list[Row], policy: str, python: Path) -> float | str:
    """Share of what would be waited if nothing were kept; or why there is none.

    ``setup`` must have a preloaded fraction: those models come from L2, the others from L3, whatever L1 did before.
    """
    numbers = {model: number for number, model in enumerate(sorted({row.model for row in rows}))}
    order = {
        "policy": policy,
        "capacity_mb": setup.l1_bytes // _MB,
        "rows": [(numbers[row.model], max(1, row.size_bytes // _MB)) for row in rows],
    }
    try:
        done = subprocess.run(
            [python, "-m", "bench.peers.caches"], input=json.dumps(order), capture_output=True, text=True, check=True,
            timeout=_TIMEOUT_S, cwd=_ROOT,
        )  # fmt: skip
    except FileNotFoundError:
        return "not installed: make bench installs the peers"
    except subprocess.TimeoutExpired:
        return f"no end within {_TIMEOUT_S:g} s"
    except subprocess.CalledProcessError as error:
        return f"failed: {(error.stderr.strip().splitlines() or ['no word'])[-1][:100]}"
    hits = json.loads(done.stdout)
    preloaded = setup.preloaded_of(numbers)
    waits = [setup.seconds(Level.L2 if row.model in preloaded else Level.L3, row.size_bytes) for row in rows]
    return sum(wait for wait, hit in zip(waits, hits, strict=True) if not hit) / sum(waits)
