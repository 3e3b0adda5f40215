"""The part of the warm attach, in small: it needs no peers and no S3 server."""

from __future__ import annotations

from bench.results import read_part
from tests.bench.test_bench_runs import bench


def test_a_quick_run_measures_checks_and_writes(tmp_path):
    ran = bench("warm", "--quick", "--size", "16MB", "--out", tmp_path, "--dir", tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    warm = read_part(tmp_path / "warm.json")
    assert [table.name for table in warm.tables] == ["dense-x1", "dense-x4", "dense-x16", "moe"]
    for table in warm.tables:
        assert str(table.rows[0][0]).startswith("cached")
        assert len(table.rows) == 5
        assert all(isinstance(value, int | float) and value > 0 for row in table.rows for value in row[1:4])
    assert all(item.figure is not None for item in warm.requirements)
