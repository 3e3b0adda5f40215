"""`cached doctor`: its frame, the checks of the host, and the experiments, each run for real in child processes."""

from __future__ import annotations

import compileall
import io
import json
import math
import os
import re
import socket
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from cached.cli.connect import Globals
from cached.cli.doctor import bounds, child, daemon, memory, worker
from cached.cli.doctor.checks import Check, Context, Finding, Group, User, Verdict, run_checks
from cached.cli.doctor.printing import Printer
from cached.cli.doctor.registry import CHECKS
from cached.errors import NotFoundError
from tests.unit.cli_support import Command, serving


@pytest.fixture
def context(tmp_path: Path) -> Context:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    return Context(Globals(str(tmp_path / "cached.sock")), str(tmp_path / "cached.sock"), sys.executable, environment)


def only(found) -> Finding:
    (finding,) = found
    return finding


def package(folder: Path, name: str, text: str, modules: int = 0) -> Path:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)
    for number in range(modules):
        (folder / name / f"m{number}.py").write_text(f"x{number} = {list(range(50))}\n" * 20)
    return folder / name


# The frame.


def test_a_check_that_cannot_be_carried_out_says_why_and_ends_no_other(context):
    def broken(_):
        yield Finding(Verdict.OK, "a part")
        raise NotFoundError("it is not there")

    def whole(_):
        yield Finding(Verdict.PROBLEM, "this is wrong")

    found = list(run_checks([Check("a", "", broken), Check("b", "", whole)], context))
    assert [(check.name, finding.verdict) for check, finding in found] == [
        ("a", "ok"), ("a", "not measured"), ("b", "problem")
    ]  # fmt: skip
    assert found[1][1].told == "this check could not be carried out: it is not there"


def test_the_exit_code_says_whether_there_is_a_problem(tmp_path, capsys):
    with serving(tmp_path) as (engine, path):
        cached = Command(engine, path, capsys)
        ran = cached("doctor", "--only", "health", "-o", "json")
        data = json.loads(ran.out)
        # The stand-in's level 2 is read-only: see STATS.
        assert (ran.code, data["problems"]) == (1, 1)
        finding = data["findings"][0]
        assert (finding["check"], finding["group"], finding["verdict"]) == ("health", "daemon", "problem")
        assert finding["told"] == "the daemon is degraded: l2 is read-only"
        assert finding["measured"]["call_ms"] > 0
        ran = cached("doctor", "--only", "health")
        assert "problem       health         the daemon is degraded" in ran.out
        assert "→ cached health" in ran.out
        assert ran.out.startswith("DAEMON\n")
        assert "0 ok, 1 problem, " in ran.out
    ran = cached("doctor", "--only", "health")
    assert ran.code == 1
    assert "no daemon on " in ran.out


def test_quick_runs_no_experiment(tmp_path, capsys):
    with serving(tmp_path) as (engine, path):
        data = json.loads(Command(engine, path, capsys)("doctor", "--quick", "--skip", "network", "-o", "json").out)
    quick = [check.name for check in CHECKS if not check.experiment and check.group != "network"]
    assert list(dict.fromkeys(item["check"] for item in data["findings"])) == quick
    assert {"health", "sockets", "shared-memory"} <= set(quick)


def test_checks_are_chosen_by_name_and_by_group_and_listed(tmp_path, capsys):
    with serving(tmp_path) as (engine, path):
        cached = Command(engine, path, capsys)
        data = json.loads(cached("doctor", "--list", "--only", "host", "--skip", "huge-pages", "-o", "json").out)
        names = [check.name for check in CHECKS if check.group is Group.HOST and check.name != "huge-pages"]
        assert [item["check"] for item in data] == names
        assert "l2-speed" in cached("doctor", "--list").out
        assert cached("doctor", "--only", "nonsense").code == 2
        assert "there is no user 'nobody-here'" in cached("doctor", "--as-user", "nobody-here").err


def test_every_check_leads_to_a_function_and_says_what_it_does(context):
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.about
        assert check.details
        if not check.experiment and check.group is not Group.NETWORK:
            assert list(check.look(context)), check.name


def test_settings_that_cannot_be_used_are_a_problem_and_end_nothing(tmp_path, capsys):
    wrong = tmp_path / "config.toml"
    wrong.write_text("[l1]\ncapacty = '1GiB'\n")
    with serving(tmp_path) as (engine, path):
        cached = Command(engine, path, capsys)
        ran = cached("doctor", "--only", "settings", "--only", "memory", "--config", str(wrong), "-o", "json")
    found = {item["check"]: item for item in json.loads(ran.out)["findings"]}
    assert (ran.code, found["settings"]["verdict"]) == (1, "problem")
    assert "l1.capacty" in found["settings"]["told"]
    assert found["memory"]["measured"]["budget_bytes"] > 0


def test_a_narrow_terminal_gets_whole_words(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("cached.cli.doctor.printing.Console", partial(Console, file=out, force_terminal=True, width=50))
    long = Finding(
        Verdict.PROBLEM, "a sentence that is much longer than fifty columns are wide, in words", mend="do it"
    )
    Printer().show(CHECKS[0], long)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in out.getvalue().splitlines()]
    assert lines[1].split() == ["problem", "health"]
    assert lines[2:4] == ["    a sentence that is much longer than fifty", "    columns are wide, in words"]
    assert lines[4] == "    \N{RIGHTWARDS ARROW} do it"


def test_children_that_fail_say_with_what(context, monkeypatch):
    with pytest.raises(ValueError, match="failed: ModuleNotFoundError: No module named 'nothing'"):
        child.run_child(context, "import nothing")
    with pytest.raises(ValueError, match="printed no result"):
        child.run_child(context, "print('hello')")
    with pytest.raises(ValueError, match="printed no result"):
        child.run_child(context, "print('[1]')")
    monkeypatch.setattr(child, "CHILD_TIMEOUT_S", 0.2)
    with pytest.raises(ValueError, match=r"longer than 0\.2 s"):
        child.run_child(context, "import time; time.sleep(60)")
    with pytest.raises(FileNotFoundError):
        child.run_child(replace(context, python="/no/python"), "")


def test_children_get_the_environment_with_its_changes(context):
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    found = child.run_child(context, code, environment={"PATH": None, "A": "b"})
    assert found["A"] == "b"
    assert found["PYTHONPATH"] == context.environment["PYTHONPATH"]
    assert "PATH" not in found


# The host.


def test_sockets_that_are_missing_wrong_or_open_to_all(context, tmp_path):
    assert [finding.verdict for finding in daemon.sockets(context)] == ["not measured"]
    with socket.socket(socket.AF_UNIX) as main:
        main.bind(context.socket)
        os.chmod(context.socket, 0o660)
        stale, missing = daemon.sockets(context)
        assert (stale.verdict, missing.verdict) == ("problem", "problem")
        assert "nobody listens" in stale.told
        main.listen()
        (tmp_path / "cached-fd.sock").write_text("")
        right, wrong = daemon.sockets(context)
        assert (right.verdict, wrong.verdict) == ("ok", "problem")
        assert "0660" in right.told
        assert "is not a socket" in wrong.told
        other = replace(context, worker=User("someone", 65533, frozenset()))
        assert "someone may not" in next(iter(daemon.sockets(other))).told
        os.chmod(context.socket, 0o666)
        finding = next(iter(daemon.sockets(context)))
        assert (finding.verdict, finding.mend) == ("advice", 'access.socket_mode = "0660"')


def test_filling_shared_memory_is_measured(context):
    finding = only(memory.huge_pages(context))
    assert finding.verdict in {"ok", "advice"}
    assert finding.measured["fresh_gb_per_s"] > 0
    assert finding.measured["again_gb_per_s"] > 0
    if finding.measured["huge_page_share"] >= 0.5:
        assert finding.verdict == "ok"
    assert not list(Path("/dev/shm").glob(f"cached.measure-{os.getpid()}.*"))


# How workers start.


def test_bytecode_that_is_missing_costs_what_was_measured(context, tmp_path):
    imports = "\n".join(f"from torch import m{number}" for number in range(60))
    place = package(tmp_path, "torch", imports, modules=60)
    finding = only(worker.bytecode(context))
    assert finding.verdict == "advice", finding
    assert finding.mend == f"{sys.executable} -m compileall -q {place}"
    assert finding.measured["missing_modules"] == 61
    assert not (place / "__pycache__").exists()  # it does not mend what it looks at
    unable = replace(context, environment={**context.environment, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "PYTHONDONTWRITEBYTECODE keeps Python from" in only(worker.bytecode(unable)).mend
    compileall.compile_dir(place, quiet=2)
    finding = only(worker.bytecode(context))
    assert finding.verdict == "ok", finding
    assert finding.told.startswith("import torch takes ")


def test_threads_are_compared_with_the_processors_there_are(context, tmp_path):
    package(tmp_path, "torch", _TORCH)
    allowed, fit = len(os.sched_getaffinity(0)), math.ceil(bounds.processors_allowed(context))
    many = replace(context, environment={**context.environment, "OMP_NUM_THREADS": str(8 * allowed)})
    finding = only(worker.threads(many))
    assert finding.measured["threads"] == 8 * allowed
    assert (finding.verdict, finding.mend) == (
        "advice",
        f"export OMP_NUM_THREADS={fit}",
    )
    fitting = replace(
        context,
        environment={**context.environment, "OMP_NUM_THREADS": str(fit)},
    )
    assert only(worker.threads(fitting)).verdict == "ok"


_TORCH = """
import os, time
def get_num_threads(): return int(os.environ["OMP_NUM_THREADS"])
class Matrix:
    def __matmul__(self, other): time.sleep(0.001 * get_num_threads())
def rand(*sizes): return Matrix()
"""
"""As it behaves with more threads than processors: they wait for one another."""


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", 64), ("250000 100000", 2.5), ("50000 100000", 0.5), ("junk", 64), (None, 64)]
)
def test_processors_are_those_of_the_quota(context, tmp_path, monkeypatch, quota, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("0::/pods/mine\n")
    folder = tmp_path / "fs/cgroup/pods/mine"
    folder.mkdir(parents=True)
    if quota:
        (folder.parent / "cpu.max").write_text(quota)
    assert bounds.processors_allowed(replace(context, proc=tmp_path, sys=tmp_path)) == expected


_CUDA = """
import os, time
class cuda:
    is_available = staticmethod(lambda: True)
    synchronize = staticmethod(lambda: None)
    get_device_name = staticmethod(lambda: "A GPU")
class Tensor:
    def add_(self, number): time.sleep(0.4 if os.environ.get("CUDA_MODULE_LOADING") == "EAGER" else 0.05)
def zeros(size, device): return Tensor()
"""


def test_how_cuda_loads_its_kernels_is_measured_not_believed(context, tmp_path):
    package(tmp_path, "torch", _CUDA)
    finding = only(worker.cuda_modules(context))
    assert finding.verdict == "ok"
    assert finding.measured["eager_s"] > finding.measured["lazy_s"]
    eager = replace(context, environment={**context.environment, "CUDA_MODULE_LOADING": "EAGER"})
    finding = only(worker.cuda_modules(eager))
    assert (finding.verdict, finding.mend) == ("advice", "export CUDA_MODULE_LOADING=LAZY")


def test_without_a_gpu_nothing_is_said_of_cuda(context, tmp_path):
    package(tmp_path, "torch", "class cuda:\n    is_available = staticmethod(lambda: False)\n")
    finding = only(worker.cuda_modules(context))
    assert finding.verdict == "not measured"
    assert "no GPU" in finding.told


def test_a_hub_that_is_there_and_one_that_is_not(context, tmp_path):
    package(tmp_path, "huggingface_hub", "")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        there = replace(context, environment={**context.environment, "HF_ENDPOINT": url})
        finding = only(worker.hub(there))
        assert (finding.verdict, finding.mend) == ("ok", "")
        assert finding.told.startswith(f"{url} is reached in ")
    finding = only(worker.hub(there))
    assert (finding.verdict, finding.mend) == ("advice", "export HF_HUB_OFFLINE=1")
    assert "Connection refused" in finding.told
    offline = replace(there, environment={**there.environment, "HF_HUB_OFFLINE": "1"})
    assert only(worker.hub(offline)).verdict == "ok"
