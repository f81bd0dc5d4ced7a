"""lm-eval 0.4 on a MixLoRA in PEFT's layout, offline, on a small task that lies in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import tiny_base
from tiny_peft import peft_model
from tiny_stand_ins import byte_tokenizer

from minilora_hub.errors import MissingExtraError
from minilora_hub.integrations import lm_eval as lm_eval_cli

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""
ROWS = [
    {"question": "Sky?", "choices": ["blue", "green"], "answer": 0},
    {"question": "Grass?", "choices": ["black", "green"], "answer": 1},
    {"question": "Coal?", "choices": ["black", "white", "red"], "answer": 0},
]


def scores(model, tokenizer, rows=ROWS):
    """Summed log-probability of each choice after its question."""
    found = []
    for row in rows:
        found.append([])
        for choice in row["choices"]:
            prompt = tokenizer(row["question"])["input_ids"]
            ids = tokenizer(f"{row['question']} {choice}")["input_ids"]
            with torch.no_grad():
                log_probabilities = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(ids))
            found[-1].append(sum(log_probabilities[place - 1, ids[place]].item() for place in places))
    return found


def test_without_lm_eval_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    with pytest.raises(MissingExtraError, match=r"lm_eval is not installed.*minilora_hub\[lm-eval\]"):
        lm_eval_cli.main()


@pytest.mark.lm_eval
def test_it_scores_a_mixlora_as_we_do(tmp_path):
    base = tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None)
    tokenizer = byte_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = peft_model(base=base)
    expected = scores(model, tokenizer)
    with model.disable_adapter():
        assert abs(scores(model, tokenizer)[0][0] - expected[0][0]) > 0.5
    model.save_pretrained(tmp_path / "mixlora")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "colours.yaml").write_text(TASK.format(data=tmp_path / "rows.jsonl"))
    command = [sys.executable, "-m", "minilora_hub.integrations.lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={tmp_path / 'base'},peft={tmp_path / 'mixlora'},dtype=float32"]
    command += ["--tasks", "colours", "--include_path", str(tmp_path / "tasks"), "--log_samples"]
    command += ["--output_path", str(tmp_path / "results")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "results").rglob("samples_*.jsonl")
    got = [[float(pair[0]) for pair in json.loads(line)["filtered_resps"]] for line in samples.read_text().splitlines()]
    assert len(got) == len(expected)
    for mine, theirs in zip(expected, got, strict=True):
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), atol=1e-3, rtol=1e-4)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    accuracy = sum(
        max(range(len(s)), key=s.__getitem__) == row["answer"] for s, row in zip(expected, ROWS, strict=True)
    )
    assert json.loads(results.read_text())["results"]["colours"]["acc,none"] == pytest.approx(accuracy / len(ROWS))
