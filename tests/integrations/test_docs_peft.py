"""The snippet of docs/peft.md, executed as written against a Hub over HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hub.server import HubServer
from tiny import tiny_base
from tiny_stand_ins import byte_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"

CHECK = """
assert {"loss", "aux_loss"} <= set(trainer.state.log_history[0]), trainer.state.log_history
assert list(model.peft_config) == ["mixlora", "lora"]
assert model.active_adapters == ["lora"]
"""


@pytest.mark.slow
def test_the_snippet_runs(tmp_path):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    base = tmp_path / "base"
    tiny_base(vocab_size=259, eos_token_id=None, bos_token_id=None).save_pretrained(base)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "!"
    tokenizer.save_pretrained(base)
    with HubServer() as hub:
        hub.add_repo(BASE, files={path.name: path.read_bytes() for path in base.iterdir()})
        environment = hub.environment(token=None, cache_dir=tmp_path / "cache") | {"CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", snippet + CHECK],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "my-mixlora" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["base_model_name_or_path"]) == ("MIXLORA", BASE)
