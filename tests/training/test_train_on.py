"""docs/train_on.md executed as written, on a tiny base, and what its results are."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from commands import run_command  # noqa: F401  a fixture
from safetensors.torch import load_file
from tiny_training import colour_rows, write_base, write_rows

from minilora_hub import MixLoraForCausalLM
from minilora_hub.publish.push.build import build
from minilora_hub.training.votes import Answer, VotedAnswers

PAGE = Path(__file__).parents[2] / "docs" / "train_on.md"
WEIGHTS = "adapter_model.safetensors"


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [line for block in blocks for line in block.strip().splitlines()]


def sources() -> dict[str, list[dict]]:
    rows = colour_rows()
    return {"first": rows[:8], "second": rows[8:16], "third": rows[16:], "mix": rows}


def write_votes(file: Path) -> None:
    votes = []
    for number, row in enumerate(colour_rows(12)):
        answers = (Answer(row["completion"], True), Answer("none", True))
        votes.append(VotedAnswers(f"{number}", "2026-11-29T12:00:00+00:00", row["prompt"], "", answers, 0).to_dict())
    file.write_text("".join(json.dumps(vote) + "\n" for vote in votes), encoding="utf-8")


@pytest.fixture
def results(run_command, tmp_path, monkeypatch):  # noqa: F811
    """Every command of the page, run in an empty folder with its files."""
    monkeypatch.chdir(tmp_path)
    base = write_base(tmp_path / "base")
    for name, rows in sources().items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    write_votes(tmp_path / "voted-answers.jsonl")
    (tmp_path / "general.txt").write_text("The sky is blue and the grass is green. " * 20, encoding="utf-8")
    printed = {}
    for command in commands():
        command = re.sub(r"num_experts=\[[\d,]+\]", "num_experts=[2,4]", command)  # the tiny base has two layers
        program, *arguments = shlex.split(command.replace("--base embedded", f"--base {base}"))
        assert program == "minilora"
        extra = ["--json"] if arguments[0] == "train" else []
        done = run_command(*arguments, *extra)
        assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
        printed[arguments[arguments.index("--out") + 1]] = json.loads(done.stdout) if extra else done.stdout
    return printed


@pytest.mark.slow
def test_every_command_of_the_page_gives_an_adapter_that_can_be_pushed(results, tmp_path):
    assert len(results) == len(commands())
    for out in results:
        assert (tmp_path / out / WEIGHTS).is_file()
    # The chain of parents, the sum of the ranks, and what the routers' training has changed.
    said = {
        out: json.loads((tmp_path / out / "results.json").read_text())
        for out in ("both", "router-only", "routed", "more-mine")
    }
    assert [one["training"]["parent"]["adapter"] for one in said.values()] == ["first", "first", "mix", "mine"]
    assert json.loads((tmp_path / "task-2" / "adapter_config.json").read_text())["r"] == 32
    for names in (("mix", "routed"), ("whole", "routed-whole")):
        before, after = (load_file(tmp_path / name / WEIGHTS) for name in names)
        assert {name.endswith(".router") for name in before if not torch.equal(before[name], after[name])} == {True}
    config = json.loads((tmp_path / "mola" / "config.json").read_text())
    assert (config["router_scope"], config["num_experts"], config["format_version"]) == ("linear", [2, 4], 4)
    assert (results["mine"]["pairs"]["votes"], results["mine"]["pairs"]["pairs"]) == (2, 2)
    assert results["more-mine"]["pairs"] is None  # nothing was held out
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "routed")
    assert (loaded.config.num_experts, loaded.config.num_experts_per_tok) == (3, 3)
    for out in ("routed", "small", "task-2", "routed-whole", "mola"):
        where = {"base_id": "org/base", "base_model": str(tmp_path / "base")}
        built = build(tmp_path / out, tmp_path / f"built-{out}", repo_id=f"me/{out}", **where)
        card = (built.folder / "README.md").read_text(encoding="utf-8")
        assert ("Continued from the adapter `mix`" in card) == (out == "routed")
        assert ("its router learned; the rest is unchanged" in card.lower()) == out.startswith("routed")
        assert ("distill: teacher=first" in card) == (out == "small")
        assert str(tmp_path) not in card
