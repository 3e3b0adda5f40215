"""Headers of safetensors files that are hostile: fuzzed ones beside the reference library, and very large ones.

``HEADER_SEED=n`` makes other ones, and repeats a run that printed n.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.headers.judge import STRICTER
from tests.headers.large import KINDS
from tests.integration.support import ROOT

SEED = int(os.environ.get("HEADER_SEED", "1"))
_MAX_GROWTH = 12
"""Of memory, by the header's size. A text of four bytes a character and one more copy of it are 10 already."""


def run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=[pytest.mark.faults, pytest.mark.timeout(1000)])])
def test_fuzzed_headers_are_read_as_the_reference_does_or_refused_with_cause(
    count: int, fault_cases: Callable[[int], None]
) -> None:
    told = run("tests.headers", "--seed", str(SEED), "--count", str(count))
    outcomes = told["outcomes"]
    fault_cases(sum(outcomes.values()))
    assert sum(outcomes.values()) == count
    assert outcomes.keys() == {"accepted", "refused", *STRICTER}  # so each of the kinds was tried
    assert min(outcomes["accepted"], outcomes["refused"]) > count / 5
    assert told["grown_kib"] < 32 * 1024


@pytest.mark.parametrize("kind", ["metadata", "a wide name", "a key", "nesting", "blanks"])
def test_memory_stays_in_proportion_to_a_large_header(kind: str) -> None:
    check_large(kind, 10)


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_in_proportion_to_the_largest_header(kind: str) -> None:
    check_large(kind, 100)


def check_large(kind: str, megabytes: int) -> None:
    told = run("tests.headers.large", kind, str(megabytes))
    says = KINDS[kind][0]
    assert says in told["message"] if says else not told["message"]
    assert len(told["message"]) < 500
    assert told["fields"] < 500
    assert told["grown_bytes"] < _MAX_GROWTH * told["header_bytes"]
