"""lm-eval 0.4 against the server: likelihoods through the scores of a prompt, and answers to chats.

`pytest -m lm_eval tests/serving/test_lm_eval.py`, with the extra lm-eval and lm-eval's own extra api.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from integrations.test_lm_eval import ROWS, TASK, scores

from minilora_hub import MixLoraForCausalLM

pytestmark = pytest.mark.lm_eval

CHAT_TASK = """
task: replies
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["<never>"], max_gen_toks: 12, temperature: 0}}
metric_list: [{{metric: exact_match}}]
"""


def evaluate(folder, kind, address, model, arguments, task, name, *flags):
    """Run lm-eval on one task, and return its samples."""
    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "tasks" / f"{name}.yaml").write_text(task.format(data=folder / "rows.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "run", "--model", kind]
    command += ["--model_args", f"model={model},base_url={address},num_concurrent=3,{arguments}"]
    command += ["--tasks", name, "--include_path", str(folder / "tasks"), "--log_samples", *flags]
    command += ["--output_path", str(folder / "results")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (folder / "results").rglob(f"samples_{name}_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def test_local_completions_score_as_the_model_does(running, saved, tmp_path):
    base, (mix, *_) = saved
    model = MixLoraForCausalLM.from_pretrained(mix, base_model=str(base))
    from tiny_stand_ins import byte_tokenizer

    expected = scores(model, byte_tokenizer())
    arguments = f"tokenizer_backend=huggingface,tokenizer={base},tokenized_requests=True"
    samples = evaluate(tmp_path, "local-completions", f"{running[1]}/v1/completions", "mix", arguments, TASK, "colours")
    got = {sample["doc"]["question"]: [float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples}
    for row, mine in zip(ROWS, expected, strict=True):
        torch.testing.assert_close(torch.tensor(got[row["question"]]), torch.tensor(mine), atol=1e-3, rtol=1e-4)


def test_local_chat_completions_get_the_servers_answers(running, http, tmp_path):
    path = "/v1/chat/completions"
    samples = evaluate(
        tmp_path, "local-chat-completions", running[1] + path, "dora", "max_retries=1", CHAT_TASK, "replies",
        "--apply_chat_template",
    )  # fmt: skip
    assert len(samples) == len(ROWS)
    for sample in samples:
        messages = [{"role": "user", "content": sample["doc"]["question"]}]
        body = {"model": "dora", "messages": messages, "max_tokens": 12, "temperature": 0}
        expected = http.post(path, json=body).json()["choices"][0]["message"]["content"]
        assert sample["filtered_resps"] == [expected]
