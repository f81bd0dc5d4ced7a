"""An adapter with a classification head is built, checked, and verified by a process without minilora_hub."""

from __future__ import annotations

import ast
import json
import re

import pytest
import tiny_stand_ins
import torch
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, tiny_config

from minilora_hub.errors import AdapterError
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.publish.verify.verify import verify
from minilora_hub.remote_code.modeling_minilora import adapted_class


def checked(folder):
    return check_folder(folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")


def trained_folder(base, folder, method="dora", auto_name="AutoModelForSequenceClassification", **labels):
    model_class = adapted_class("Dora" if method == "dora" else "MixLora", auto_name)
    model = model_class.from_base(str(base), tiny_config(method), **labels)
    fill_adapter(model)
    model.eval().save_pretrained(folder, tokenizer=tiny_stand_ins.byte_tokenizer())
    return model


@pytest.mark.parametrize(
    ("method", "auto_name", "task"),
    [
        pytest.param("dora", "AutoModelForSequenceClassification", "text-classification", marks=pytest.mark.slow),
        pytest.param("mixlora", "AutoModelForTokenClassification", "token-classification", marks=pytest.mark.slow),
        pytest.param("dora", "AutoModel", "feature-extraction", marks=pytest.mark.slow),
    ],
)
def test_built_checked_and_verified(process, base_folder, tmp_path, method, auto_name, task):
    headless = auto_name == "AutoModel"
    labels = {} if headless else {"id2label": {0: "bad", 1: "good", 2: "odd"}}
    model = trained_folder(base_folder, tmp_path / "trained", method, auto_name, **labels)
    settings = {"repo_id": "ana/classifier", "base_id": "org/base", "license": "apache-2.0"}
    made = build(tmp_path / "trained", tmp_path / "built", base_model=str(base_folder), **settings)
    assert [problem for problem in checked(made.folder) if problem.blocking] == []
    config = json.loads((made.folder / "config.json").read_text())
    assert config["format_version"] == (1 if headless else 2)
    assert list(config["auto_map"]) == ["AutoConfig", auto_name, *["AutoModelForCausalLM"] * headless]
    assert config["architectures"] == [type(model).__name__]
    card = (made.folder / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert headless or f"| Trained and saved whole | `{config['modules_to_save'][0]}` |" in card
    assert "minilora demo" not in card
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    ast.parse(snippet)
    assert f"{auto_name}.from_pretrained(repo" in snippet
    report = verify(made.folder, base_model=str(base_folder), process=process, progress=False)
    assert report.ok, report.problem
    assert report.difference < 1e-4
    assert {"copy with a missing tensor", "copy with a NaN"} <= {step.name for step in report.steps}


def test_a_damaged_head_is_found(base_folder, tmp_path):
    trained_folder(base_folder, tmp_path / "trained", num_labels=3)
    settings = {"repo_id": "ana/classifier", "base_id": "org/base", "license": "apache-2.0"}
    folder = build(tmp_path / "trained", tmp_path / "built", base_model=str(base_folder), **settings).folder
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors["score.weight"].shape == (3, 32)
    save_file(tensors | {"score.weight": torch.zeros(2, 32)}, folder / "adapter_model.safetensors")
    said = [problem.message for problem in checked(folder) if problem.code == "tensors"]
    assert said == ["score.weight has shape (2, 32), this configuration and base need (3, 32)"]
    del tensors["score.weight"]
    save_file(tensors, folder / "adapter_model.safetensors")
    assert [p.message for p in checked(folder) if p.code == "tensors"] == ["score.weight is missing"]


def test_a_classifier_gets_no_handler_that_generates(base_folder, tmp_path):
    trained_folder(base_folder, tmp_path / "trained", num_labels=3)
    settings = {"repo_id": "ana/classifier", "base_id": "org/base", "license": "apache-2.0", "endpoint": True}
    with pytest.raises(AdapterError, match=r"generates text, and this adapter is for AutoModelForSequenceClassif"):
        build(tmp_path / "trained", tmp_path / "built", base_model=str(base_folder), **settings)


def test_an_auto_map_under_the_wrong_class_is_refused(base_folder, tmp_path):
    trained_folder(base_folder, tmp_path / "trained", num_labels=3)
    path = tmp_path / "trained" / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"]["AutoModelForCausalLM"] = config["auto_map"]["AutoModelForSequenceClassification"]
    path.write_text(json.dumps(config))
    assert "auto-map" in {problem.code for problem in checked(tmp_path / "trained") if problem.blocking}
