"""`minilora import` by ids on a Hub over HTTP: the adapter's and its base's."""

import os
import subprocess
import sys

import pytest
import torch
from formats.helpers import base_folder, mixlora, reference_folder
from hub.server import HubServer
from tiny import logits, tiny_base

from minilora_hub import MixLoraForCausalLM
from minilora_hub.adapter_folder.folders import read_json


@pytest.mark.slow
def test_import_by_id(tmp_path):
    base = base_folder(tmp_path)
    model = mixlora(tiny_base())
    source = reference_folder(tmp_path / "source", model)
    with HubServer() as hub:
        for repo, folder in (("org/base", base), ("ana/mixlora", source)):
            hub.add_repo(repo, files={path.name: path.read_bytes() for path in folder.iterdir()})
        environment = hub.environment(token=None, cache_dir=tmp_path / "cache")
        command = [sys.executable, "-m", "minilora_hub.cli", "import", "ana/mixlora", "--out", str(tmp_path / "out")]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        commit = hub.repo("org/base").commit("main").oid
    assert done.returncode == 0, done.stderr[-3000:]
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("org/base", commit)
    assert not any("safetensors" in path.name for path in (tmp_path / "cache").rglob("*")), (
        "the base's weights came, too"
    )
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out", base_model=tiny_base())
    assert torch.equal(logits(loaded), logits(model))
