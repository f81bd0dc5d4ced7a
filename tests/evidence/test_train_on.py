"""The steps of the evidence on continued trainings, on a tiny base: each one is made, measured and told."""

from __future__ import annotations

import json

import pytest
from evidence import train_on, train_on_report
from evidence.plan import TASKS
from tiny_training import write_base

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.evaluation.tasks.registry import write


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(train_on_report, "FOLDER", tmp_path)
    right = {"step": "mean", "part": "router", "steps": 24, "items": 2, "exact": dict.fromkeys(TASKS, "10")}
    (tmp_path / "mean.json").write_text(json.dumps(right))
    text = train_on_report.report()
    assert "| mean | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |  |" in text
    missing = " ".join(text.split("Not run: ")[1].split())
    assert missing.startswith("single-dates, ")
    assert " mean," not in missing


@pytest.mark.slow
def test_every_step_is_made_and_measured(tmp_path):
    base = str(write_base(tmp_path / "base"))
    config = MixLoraConfig(r=2, num_experts=2, base_model_name_or_path=base)
    MixLoraForCausalLM.from_base(base, config).save_pretrained(tmp_path / "teacher")
    write(tmp_path / "data", (), ("train",), 16)
    train_on.write_general_text(tmp_path / "general.txt")
    runs = train_on.Runs(tmp_path, train_on.Sizes(steps=1, items=1), base, tmp_path / "teacher", budget=6500)
    steps = runs.steps()
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        result = runs.measure(step)
        assert {task: len(exact) for task, exact in result["exact"].items()} == dict.fromkeys(TASKS, 1)
        assert ("perplexity" in result) == step.perplexity
    ranks = {
        kind: json.loads((runs.adapter(f"sequence-{kind}-4-{TASKS[3]}") / "adapter_config.json").read_text())["r"]
        for kind in train_on.SEQUENCES
    }
    assert ranks == {"continued": 8, "kept": 32, "orthogonal": 32}
