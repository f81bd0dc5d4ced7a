"""The commands of docs/train.md for one's own texts, executed as written on a tiny base."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
from commands import run_command  # noqa: F401  a fixture
from tiny_training import write_base

from minilora_hub.training import sources

PAGE = Path(__file__).parents[2] / "docs" / "train.md"


@pytest.mark.slow
def test_an_adapter_learns_a_document(run_command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "PASSAGE", 300)  # a token of this base is one byte, and its context is short
    base = write_base(tmp_path / "base")
    verse = "Over the hills and far away, the king of the hills has a word to say.\n"
    Path("notes.txt").write_text("\n".join(verse * 3 for _ in range(60)), encoding="utf-8")
    section = PAGE.read_text(encoding="utf-8").split("## Your own texts")[1]
    commands = re.findall(r"```bash\n(.*?)```", section, re.S)[0].replace("embedded", str(base)).strip().splitlines()
    for command in commands:
        done = run_command(*shlex.split(command)[1:])
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    assert "my-style" in done.stdout
    with Path("my-style/loss.csv").open(encoding="utf-8") as file:
        losses = [float(row["validation_loss"]) for row in csv.DictReader(file) if row["validation_loss"]]
    assert losses[-1] < losses[0] - 0.05
