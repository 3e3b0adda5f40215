from __future__ import annotations

import re

import pytest

from tests.fault.rows import ROWS, Row, covering
from tests.integration.support import ROOT


def test_no_row_is_left_out() -> None:
    assert [row.number for row in ROWS] == list(range(1, 33))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row.number))
def test_the_tests_of_a_row_exist(row: Row) -> None:
    for name in row.tests:
        path, _, function = name.partition("::")
        text = (ROOT / path).read_text()
        assert re.search(rf"^(async )?def {function or 'test_'}", text, re.MULTILINE), name
        assert row.number in covering(f"{name}[a-parameter]")
