"""docs/low_bit.md executed as written, on a tiny base, up to a repo that can be pushed."""

from __future__ import annotations

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
from commands import run_command  # noqa: F401  a fixture
from tiny_training import write_base, write_rows

from minilora_hub.publish.push.build import build

PAGE = Path(__file__).parents[2] / "docs" / "low_bit.md"


@pytest.mark.slow
def test_every_command_of_the_page_gives_a_base_or_an_adapter(run_command, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    block = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)[0]
    for command in block.strip().splitlines():
        if "int3" in command and find_spec("torchao") is None:
            continue
        program, *arguments = shlex.split(command.replace("quantize embedded", f"quantize {base}"))
        assert program == "minilora"
        done = run_command(*arguments)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        assert not re.search(r"Traceback|Failed to load|deprecated", done.stderr), done.stderr
    built = build(
        tmp_path / "my-adapter",
        tmp_path / "built",
        repo_id="me/my-adapter",
        base_id="me/base-nf4",
        base_model=str(tmp_path / "base-nf4"),
    )
    card = (built.folder / "README.md").read_text(encoding="utf-8")
    assert "base_model: me/base-nf4" in card
    assert "calibrated: makes up for the rounding of the quantized base" in card
    assert str(tmp_path) not in card
