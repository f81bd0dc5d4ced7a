"""The table of architectures in docs/load.md is what is found by trying every one of them."""

from __future__ import annotations

import architecture_table
import pytest
from architecture_table import ROWS, rows_of_page

PAGE = rows_of_page()


def test_the_table_has_every_row():
    assert {(f"| {name}", f"`{auto_name}`") for name, auto_name in ROWS.values()} == PAGE.keys()
    assert len({name for name, _ in ROWS.values()}) >= 60


@pytest.mark.parametrize(
    "key", [pytest.param(key, marks=[pytest.mark.slow] * (key != "llama CausalLM")) for key in sorted(ROWS)]
)
def test_a_row_is_what_is_found(key):
    """If not: python tests/architecture_table.py NAME."""
    name, auto_name = ROWS[key]
    assert architecture_table.row(key) == PAGE[f"| {name}", f"`{auto_name}`"]
