"""Processor time of real processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.cpu import measured, wait_idle
from cached.cli.measure.cpu import tree_cpu_s

BURN = "import time\nwhile time.process_time() < {s}: pass\n"
CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}])\n"


def start(code):
    """A process that runs ``code`` and then waits to be told to end."""
    code += "print('done', flush=True)\ninput()\n"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def running(request):
    process = start(request.param)
    assert process.stdout.readline() == "done\n"
    yield process
    process.communicate("\n")


@pytest.mark.parametrize("running", [BURN.format(s=0.3)], indirect=True)
def test_a_busy_process_is_counted(running):
    assert 0.25 < tree_cpu_s(running.pid) < 1.0


@pytest.mark.parametrize("running", [CHILD.format(code=BURN.format(s=0.3))], indirect=True)
def test_a_child_that_ended_is_counted(running):
    assert 0.25 < tree_cpu_s(running.pid) < 1.0


NESTED = (
    "import subprocess, sys\n"
    f"code = {BURN.format(s=0.3)!r} + 'print(1, flush=True); input()'\n"
    "child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)\n"
    "child.stdout.readline()\n"
)


@pytest.mark.parametrize("running", [NESTED], indirect=True)
def test_a_child_that_still_runs_is_counted_once_even_if_both_are_named(running):
    children = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
    assert 0.25 < tree_cpu_s(running.pid) < 1.0
    assert tree_cpu_s(running.pid, *children) == pytest.approx(tree_cpu_s(running.pid), abs=0.05)


@pytest.mark.parametrize("running", [""], indirect=True)
def test_idle_is_noticed_and_processes_that_are_gone_cost_nothing(running):
    assert wait_idle(running.pid, timeout_s=30)
    assert tree_cpu_s(2**22 + 1) == 0


def test_busy_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert not wait_idle(process.pid, timeout_s=0.5)
        finally:
            process.kill()


def test_a_block_is_measured_with_this_process_and_the_others():
    with measured() as span:
        total = sum(range(3_000_000))
    assert total
    assert 0 < span.cpu_s <= span.seconds + 0.1
