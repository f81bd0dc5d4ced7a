"""A tiny base on disk and rows beside it, made once."""

from __future__ import annotations

import pytest
from commands import run_command
from processes import Forked
from tiny_training import write_base, write_rows

__all__ = ["run_command"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return str(write_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl"))


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    return Forked(tmp_path_factory.mktemp("forked") / "said.txt")


@pytest.fixture
def rows(tmp_path):
    return str(write_rows(tmp_path / "rows.jsonl"))
