"""What people are told of the policy: ls, show, tier --what-if and stats --trace."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from cached.cli.failures import exit_code
from cached.errors import NoRoomError
from cached.policy.hot import check_hot
from cached.simulate.trace import Row, read_trace
from cached.types import Attached, Tier, TierChange
from tests.unit.cli_support import Command, serving
from tests.unit.rpc_support import SUMMARY


@pytest.fixture
def cached(tmp_path, capfd):
    with serving(tmp_path) as (engine, socket):
        yield Command(engine, socket, capfd)


def test_ls(cached):
    header, row = cached("ls").out.splitlines()
    columns = ["MODEL", "STATE", "TIER", "BY", "VALUE", "IDLE", "SIZE", "L1", "L2", "LEASES", "NOTES"]
    assert header.split() == columns
    assert row.split()[:7] == ["tiny", "ready", "50%", "warm", "catalog", "3m20s", "in"]
    assert row.endswith("pinned, transient, adapter of tiny-base")


def test_ls_wide_has_the_rest(cached):
    header, row = cached("ls", "--wide").out.splitlines()
    assert header.split()[-4:] == ["NOTES", "REVISION", "TENANT", "SOURCE"]
    assert row.split()[-3:] == ["r1", "red", "s3://b/tiny"]


def test_ls_without_anything_to_note_has_no_notes(cached, monkeypatch):
    plain = dataclasses.replace(
        SUMMARY, pinned=False, transient=False, base="", worth_s=0.0, lease_count=0, last_used_time_s=0.0
    )
    monkeypatch.setattr(cached.engine, "list_models", lambda: (plain,))
    header, row = cached("ls").out.splitlines()
    assert "NOTES" not in header
    assert row.split()[5:7] == ["-", "-"]


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_terminal_of_any_width_shows_whole_numbers(width):
    rows = [
        [name, "ready", "hot", "operator", "12m30s", "3h05m", "1023 MiB", "1023 MiB", "1023 MiB", "3"]
        for name in ("meta-llama/Llama-3.3-70B-Instruct-with-a-name-that-does-not-end", "模型模型模型模型模型模型模型")
    ]
    columns = ("MODEL", "STATE", "TIER", "BY", "VALUE", "IDLE", "SIZE", "L1", "L2", "LEASES")
    spare = ("SIZE", "LEASES", "BY", "IDLE")
    script = (
        "import sys\nfrom cached.cli.output import print_table\n"
        f"print_table({columns!r}, {rows!r}, right=('L1', 'L2'), spare={spare!r}, folding=('MODEL',))"
    )
    environment = {"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": str(width), "FORCE_COLOR": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    lines = [cell_len(re.sub(r"\x1b\[[0-9;]*m", "", line)) for line in ran.stdout.splitlines()]
    assert max(lines) <= width
    assert ran.stdout.count("1023 MiB") == (6 if width >= 100 else 4), "the size is left out where there is no room"
    assert ran.stdout.count("12m30s") == 2
    assert ("operator" in ran.stdout) is (width >= 80)


def test_show_tells_why(cached):
    lines = cached("show", "tiny").out.splitlines()
    assert "90 B in l1: it spares 3m20s" in lines
    (place,) = [line for line in lines if line.startswith("L1  ")]
    *figures, verified, ago, first, second = place.split()
    assert [*figures, ago, first, second] == ["L1", "90", "B", "3m20s", "2.50", "1m20s", "ago", "other,", "last"]
    assert re.fullmatch(r"\d+d\d+h", verified), "how long ago it was verified, of a time long past"
    told = "\n".join(lines)
    assert "warm (by catalog), pinned, transient, adapter of tiny-base, tenant red" in told
    assert "mon-fri 08:00-20:00" in told
    assert told.count(", in ") == 2, "when the window begins, and when it is pulled"


def test_tier_what_if(cached):
    ran = cached("tier", "tiny", "hot", "--what-if")
    assert cached.engine.calls == [("what_if", "tiny", Tier.HOT)]
    assert ran.out.splitlines()[:3] == ["tiny would be warm (by catalog).", "To load: 40 B", "Would leave: 50 B"]
    assert ran.out.splitlines()[-1].split(maxsplit=5)[:4] == ["L1", "other", "50", "B"]
    assert ran.out.rstrip().endswith("it was worth least for each byte")
    data = json.loads(cached("tier", "tiny", "hot", "--what-if", "-o", "json").out)
    assert data["evictions"][0]["reason"] == "worth least"
    assert data["loaded_bytes"] == 40


def test_tier_what_if_of_a_model_that_never_came(cached, monkeypatch):
    change = TierChange(dataclasses.replace(SUMMARY, tier=Tier.HOT, size_bytes=0), (), 0)
    monkeypatch.setattr(cached.engine, "what_if", lambda *_: change)
    told = cached("tier", "tiny", "hot", "--what-if").out
    assert "To load: nobody knows yet how large it is" in told
    assert "Nothing would leave." in told


def test_tier_beyond_the_budget_says_who_has_it(cached):
    with pytest.raises(NoRoomError) as caught:
        check_hot({"other": 90}, "tiny", 50, 100)
    cached.engine.error = caught.value
    ran = cached("tier", "tiny", "hot")
    assert ran.code == exit_code("NO_ROOM")
    assert "tiny (50 B) does not fit into the 100 B for hot models: 10 B are left beside other (90 B)" in ran.err
    assert "make another one warm" in ran.err


def test_stats_trace_is_what_simulate_reads(cached, tmp_path):
    cached.engine.attached = [Attached(1.5, 'a, "b"', 100, 2.25), Attached(3.0, "c", 200, 0.0)]
    out = cached("stats", "--trace").out
    assert out.splitlines()[0] == "time_s,model,size_bytes,lease_s"
    (tmp_path / "trace.csv").write_text(out)
    assert read_trace(tmp_path / "trace.csv") == [Row(1.5, 'a, "b"', 100, 2.25), Row(3.0, "c", 200, 0.0)]
    assert json.loads(cached("stats", "--trace", "-o", "json").out)[1] == {
        "time_s": 3.0, "model": "c", "size_bytes": 200, "lease_s": 0.0,
    }  # fmt: skip
    cached.engine.attached = []
    assert cached("stats", "--trace").out == "time_s,model,size_bytes,lease_s\n"
