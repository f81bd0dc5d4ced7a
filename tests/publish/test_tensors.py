"""The tensors that a file must hold follow from the configuration: a file or a configuration that differs is found."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora_hub.publish.checks.files import read_folder
from minilora_hub.publish.checks.tensors import check_adapter

WEIGHTS = "adapter_model.safetensors"


def problems_of(folder):
    return list(check_adapter(read_folder(folder)[0]))


@pytest.fixture(params=["mixlora", "dora"])
def built(request, good, tmp_path):
    return shutil.copytree(good[request.param], tmp_path / "built")


def test_a_built_folder_has_exactly_these(built):
    assert problems_of(built) == []


def misshapen(tensors, name):
    tensors[name] = tensors[name][:-1].clone()


def not_finite(tensors, name):
    tensors[name].view(-1)[-1] = float("nan")


def integers(tensors, name):
    tensors[name] = torch.zeros_like(tensors[name], dtype=torch.int32)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update(stray=torch.zeros(2)), "stray does not belong"),
        (misshapen, "has shape"),
        (not_finite, "not finite"),
        (integers, "has dtype torch.int32"),
    ],
)
def test_every_way_a_file_can_differ_is_found(built, damage, message):
    folder = built
    tensors = load_file(folder / WEIGHTS)
    damage(tensors, sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS)
    found = [problem.message for problem in problems_of(folder) if problem.file == WEIGHTS]
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 3, "has shape"),
        ("target_modules", ["q_proj", "up_proj"], "does not belong to this configuration"),
        ("lora_alpha", -1, "does not load: lora_alpha=-1"),
        ("architectures", ["LlamaForCausalLM"], "architectures="),
        ("text_config", None, "text_config is missing"),
        ("text_config.num_hidden_layers", 3, "is missing"),
    ],
)
def test_a_changed_configuration_is_found(built, field, value, message):
    folder = built
    path = folder / "config.json"
    config = json.loads(path.read_text())
    place = config["text_config"] if field.startswith("text_config.") else config
    place[field.rpartition(".")[2]] = value
    path.write_text(json.dumps(config))
    found = [problem.message for problem in problems_of(folder)]
    assert any(message in text for text in found), found
