"""The benchmark runs from the command line, with a real server and a real daemon; peers are not needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.results import Role, read_part

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments):
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110, env=os.environ)


def test_a_quick_run_measures_checks_and_writes(tmp_path):
    ran = bench(
        "s3", "--quick", "--size", "8MB", "--contests", "http", "--only", "cached-crc,runai-8,limit",
        "--peers", tmp_path / "none" / "python", "--out", tmp_path, "--dir", tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = read_part(tmp_path / "s3.json")
    contest = result.contests[0]
    measured = {item.name: item for item in contest.standings}
    assert set(measured) == {"cached-crc", "runai-8", "limit", "limit-fresh"}
    for name in ("cached-crc", "limit", "limit-fresh"):
        sample = measured[name].samples[0]
        assert 7_500_000 < sample.size_bytes < 8_500_000
        assert sample.seconds > 0
        assert sample.cpu_s >= 0
    assert measured["limit"].role is Role.LIMIT
    assert measured["runai-8"].reason == "not installed: make bench installs the peers"
    assert result.hardware["cores"] >= 1
    assert result.hardware["versions"]["boto3"]
    to_limit = next(item for item in result.requirements if "to the limit" in item.text and "pool in use" in item.text)
    assert to_limit.figure == contest.ratio("cached-crc", "limit")
    assert "not installed" in ran.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["s3.json"]


def test_parts_are_listed_and_one_that_does_not_exist_is_refused():
    listed = bench("--list")
    assert listed.returncode == 0
    assert "s3 " in listed.stdout
    refused = bench("nosuch")
    assert refused.returncode == 2
    assert "there is no part nosuch" in refused.stdout


def test_a_contest_that_does_not_exist_is_refused_and_nothing_is_written(tmp_path):
    refused = bench("streaming", "--quick", "--contests", "nosuch", "--out", tmp_path / "results", "--dir", tmp_path)
    assert refused.returncode == 1
    assert "streaming has no contest nosuch" in refused.stdout
    assert not (tmp_path / "results").exists()
