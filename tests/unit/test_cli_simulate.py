"""`cached simulate` from its command line: results computed by hand, JSON keys, bad input, the curve."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from cached.cli.main import main

KEYS = [
    "attaches", "l1_hits", "l2_hits", "cold_start_s", "cold_start_share", "mean_s", "p90_s", "p99_s", "l3_bytes",
    "l2_bytes", "evictions",
]  # fmt: skip
HOST = ["--l1", "20GB", "--l2", "40GB", "--l2-latency", "1s", "--l2-bandwidth", "10GB/s", "--l3-latency", "3s",
        "--l3-bandwidth", "2GB/s"]  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """L1 holds two of these, L2 four: a b c from the origin, a again from L2, c from L1."""
    path = tmp_path / "trace.csv"
    lines = [f"{index * 60},{model},10000000000" for index, model in enumerate("abcac")]
    path.write_text("\n".join(["time_s,model,size_bytes", *lines, ""]))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["simulate", *map(str, arguments)])
    return (code, *capsys.readouterr())


def policies(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    code, out, _ = run(capsys, *arguments, "-o", "json")
    assert code == 0
    data = json.loads(out)
    assert list(data) == ["policies"]
    return dict(data["policies"])


def test_lru_by_hand(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = policies(capsys, trace, *HOST, "--policy", "lru")
    assert found == {
        "lru": {
            "attaches": 5, "l1_hits": 1, "l2_hits": 1, "cold_start_s": 26.0, "cold_start_share": 0.65, "mean_s": 5.2,
            "p90_s": 8.0, "p99_s": 8.0, "l3_bytes": 30_000_000_000, "l2_bytes": 10_000_000_000, "evictions": 2,
        }
    }  # fmt: skip


def test_all_policies_by_default_in_order_each_with_exactly_these_keys(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = policies(capsys, trace, *HOST)
    assert list(found) == ["default", "lru", "gdsf", "bound"]
    assert [list(outcome) for outcome in found.values()] == [KEYS] * 4
    assert found["bound"]["cold_start_s"] <= found["default"]["cold_start_s"]
    assert found["bound"]["evictions"] is None


def test_the_table_is_for_people(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, trace, *HOST, "--policy", "lru,bound")
    header, lru, bound = out.splitlines()
    assert code == 0
    assert header.split()[:2] == ["POLICY", "MEAN"]
    assert lru.split() == ["lru", "5.20", "s", "8.0", "s", "8.0", "s", "26.0", "s", "65.0%", "1", "1", "10", "GB", "30",
                           "GB", "2"]  # fmt: skip
    assert bound.split()[3] == "-"


def test_preloaded(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = policies(capsys, trace, *HOST, "--l1", "0", "--l2-preloaded", "1", "--policy", "default")
    assert (found["default"]["l2_hits"], found["default"]["cold_start_s"]) == (5, 10.0)


def test_tiers(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiers = tmp_path / "tiers.json"
    tiers.write_text('{"models": {"b": {"tier": "hot"}}}')
    found = policies(capsys, trace, *HOST, "--l1", "10GB", "--tiers", tiers, "--policy", "default,lru")
    assert found["default"]["l1_hits"] == 1
    assert found["default"]["evictions"] == 0
    assert found["lru"]["l1_hits"] == 0


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--policy", "best"], "best is not among default, lru, gdsf, bound"),
        (["--policy", ","], "nothing is not among"),
        (["--l1", "big"], "'big' is not a size"),
        (["--l2-bandwidth", "0GB/s"], "would never end"),
        (["--l2-bandwidth", "fast"], "is not a size"),
        (["--l3-latency", "soon"], "'soon' is not a duration"),
        (["--l2-preloaded", "1.5"], "1.5"),
        (["--sweep-l1", "1GB,x"], "'x' is not a size"),
    ],
)
def test_wrong_options_are_refused(
    trace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], what: str
) -> None:
    code, out, err = run(capsys, trace, *arguments)
    assert (code, out) == (2, "")
    assert what in err


def test_a_bad_row_ends_with_file_line_and_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("time_s,model,size_bytes\n0,a,10\n1,b,ten\n")
    code, out, err = run(capsys, path)
    assert (code, out) == (2, "")
    assert f"{path}:3: size_bytes 'ten' is not a number" in err.replace("\n", "")


def test_a_sweep_prints_the_curve(
    trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, trace, *HOST, "--sweep-l1", "30GB,10GB", "--policy", "lru,bound")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["L1", "LRU", "MEAN", "BOUND", "MEAN"],
        ["10", "GB", "5.60", "s", *out.splitlines()[1].split()[4:]],
        ["30", "GB", "4.80", "s", *out.splitlines()[2].split()[4:]],
    ]
    drawn = (tmp_path / "sweep.png").exists()
    assert drawn == (importlib.util.find_spec("matplotlib") is not None)
    assert ("drawn to sweep.png" in err) == drawn


def test_a_sweep_as_json(
    trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, trace, *HOST, "--sweep-l1", "10GB,30GB", "--policy", "lru", "-o", "json")
    points = json.loads(out)["sweep"]
    assert code == 0
    assert [point["l1_bytes"] for point in points] == [10_000_000_000, 30_000_000_000]
    assert [list(point["policies"]["lru"]) for point in points] == [KEYS] * 2


def test_without_what_draws_it_is_said_what_to_install(
    trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.backends.backend_agg", None)
    arguments = (trace, *HOST, "--sweep-l1", "10GB", "--policy", "lru")
    code, out, err = run(capsys, *arguments)
    assert (code, len(out.splitlines())) == (0, 2)
    assert "pip install 'cached[draw]'" in err
    code, out, err = run(capsys, *arguments, "--png", "curve.png")
    assert (code, len(out.splitlines())) == (2, 2)
    assert "matplotlib, which draws the curve, is not installed" in err


def test_the_curve_is_a_png(trace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png = tmp_path / "curve.png"
    code, _, _ = run(capsys, trace, *HOST, "--sweep-l1", "10GB,20GB,30GB", "--policy", "lru,default", "--png", png)
    assert code == 0
    assert png.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    code, _, err = run(
        capsys, trace, *HOST, "--sweep-l1", "10GB", "--policy", "lru", "--png", tmp_path / "no" / "x.png"
    )
    assert code == 2
    assert "cannot be written" in err
