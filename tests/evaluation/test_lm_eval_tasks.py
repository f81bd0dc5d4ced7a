"""`minilora eval --lm-eval`: lm-eval's library on the bank's model, against the models on their own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations.test_lm_eval import TASK, scores
from tiny import CAUSAL_LM
from tiny_stand_ins import byte_tokenizer, save_base_and_adapters, tiny_llama
from transformers import AutoModelForCausalLM

from minilora_hub import cli
from minilora_hub.adapter_folder.results import Evaluation, Results

QUESTIONS = [
    {"question": f"{word}?", "choices": ["blue", "green", "a long one"], "answer": number % 3}
    for number, word in enumerate(
        ("sky", "grass", "coal", "snow", "sand", "leaf", "rose", "ink", "milk", "rust", "sea", "sun")
    )
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_base_and_adapters(tmp_path_factory.mktemp("adapters"))


def main(capsys, *arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["eval", *map(str, arguments)])
    return exit_.value.code, capsys.readouterr().err


def test_wrong_arguments_and_a_missing_lm_eval(saved, capsys, monkeypatch, tmp_path):
    """All of them before anything is loaded."""
    monkeypatch.setattr("minilora_hub.evaluation.lm_eval_tasks.load_base", lambda *_, **__: pytest.fail("loaded"))
    base, (mix, *_) = saved
    common = [mix, "--base", base, "--lm-eval", "colours"]
    for arguments, said in (
        (["--perplexity"], "--perplexity: only applies to the built-in tasks: leave it out with --lm-eval"),
        (["--task", "dates"], "--task: only applies to the built-in tasks"),
        (["--count", "0"], "count=0: must be at least 1"),
        (["--include-path", tmp_path / "none"], "include_path="),
    ):
        code, error = main(capsys, *common, *arguments)
        assert code == 1
        assert said in error
        assert error.count("\n") == 1
    code, error = main(capsys, mix, "--base", base, "--include-path", tmp_path)
    assert (code, error.count("\n")) == (1, 1)
    assert "must come with --lm-eval" in error
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.tasks", raising=False)
    code, error = main(capsys, *common)
    assert code == 1
    assert "lm_eval is not installed. It comes with: pip install 'minilora_hub[lm-eval]'" in error


@pytest.mark.lm_eval
def test_it_measures_every_adapter_as_it_is_alone(saved, tmp_path):
    base, adapters = saved
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    older = Evaluation("Dates", "exact match", 0.5)
    mix, dora, lora = adapters
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}

    def run(*arguments):
        command = [sys.executable, "-m", "minilora_hub.cli", "eval", *map(str, arguments), "--base", str(base)]
        command += ["--include-path", str(tmp_path / "tasks"), "--batch-size", "5"]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    done = run(mix, dora, lora, "--lm-eval", "colours")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lm-eval: colours: acc, 12 items" in done.stdout
    expected = [accuracy(loaded(base, folder)) for folder in (None, *adapters)]
    assert len(set(expected)) > 1
    for folder, value in zip(adapters, expected[1:], strict=True):
        (row,) = Results.load(folder).evaluation
        assert (row.task, row.metric, row.n) == ("lm-eval: colours", "acc", 12)
        assert (row.value, row.base_value) == (pytest.approx(value, abs=1e-4), pytest.approx(expected[0], abs=1e-4))
        error = (value * (1 - value) / 11) ** 0.5
        assert row.interval == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=2e-4)
        assert row.command == "minilora eval DIR --base BASE --lm-eval colours --dtype float32 --batch-size 5"

    before = Results.load(mix)
    dataclasses.replace(before, evaluation=(older, *before.evaluation)).save(mix)
    assert run(mix, "--lm-eval", "colours", "--count", "4").returncode == 0
    after = Results.load(mix).evaluation
    assert [(row.task, row.n) for row in after] == [("lm-eval: colours", 4), ("Dates", None)]
    done = run(mix, "--lm-eval", "colors")
    assert done.returncode == 1
    assert "lm_eval='colors': must be a task that lm-eval knows" in done.stderr


def loaded(base: Path, folder: Path | None):
    if folder is None:
        return AutoModelForCausalLM.from_pretrained(base).eval()
    if folder.name == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    method = {"mix": "mixlora", "dora": "dora"}[folder.name]
    return CAUSAL_LM[method].from_pretrained(folder, base_model=tiny_llama()).eval()


def accuracy(model) -> float:
    """The share of questions whose right choice is the most probable."""
    found = scores(model, byte_tokenizer(), QUESTIONS)
    hits = [torch.tensor(some).argmax().item() == row["answer"] for some, row in zip(found, QUESTIONS, strict=True)]
    return sum(hits) / len(hits)
