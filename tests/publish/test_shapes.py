"""The tensors that a file must hold, known from the loaded model: a file or configuration that differs is found."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora_hub import DoraConfig, MixLoraConfig
from minilora_hub.adapter_folder.hashes import Hashes
from minilora_hub.publish.checks.files import read_folder
from minilora_hub.publish.checks.tensors import check_adapter
from minilora_hub.publish.push.build import build
from minilora_hub.recording.shapes import expected_shapes

CONFIGS = {"mixlora": MixLoraConfig, "dora": DoraConfig}
WEIGHTS = "adapter_model.safetensors"


def problems_of(folder, shapes):
    return list(check_adapter(read_folder(folder, Hashes())[0], shapes))


@pytest.fixture(params=["mixlora", "dora"])
def built(request, trained, base_folder, tmp_path):
    """An adapter that was just built, and the tensors of the model it was built with."""
    seen = []
    folder = build(
        trained[request.param],
        tmp_path / "built",
        repo_id="ana/x",
        base_model=str(base_folder),
        meanwhile=lambda folder, shapes, card: seen.append(shapes),
    ).folder
    return folder, *seen


def test_they_are_those_of_the_structure_without_weights(built):
    folder, shapes = built
    config = json.loads((folder / "config.json").read_text())
    expected, layers_path, why_not = expected_shapes(CONFIGS[config["model_type"]].from_dict(config))
    assert (shapes.tensors, shapes.layers_path, why_not) == (expected, layers_path, "")
    assert shapes.follow_from(config)
    assert problems_of(folder, shapes) == problems_of(folder, None) == []


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
    folder, shapes = built
    tensors = load_file(folder / WEIGHTS)
    damage(tensors, sorted(tensors)[0])
    save_file(tensors, folder / WEIGHTS)
    found = [problem.message for problem in problems_of(folder, shapes) if problem.file == WEIGHTS]
    assert any(message in text for text in found), found


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 3, "has shape"),
        ("target_modules", ["q_proj", "up_proj"], "does not belong to this configuration"),
        ("lora_alpha", -1, "does not load: lora_alpha=-1"),
        ("architectures", ["LlamaForCausalLM"], "architectures="),
        ("text_config", None, "text_config is missing"),
    ],
)
def test_another_configuration_is_looked_at_anew(built, field, value, message):
    folder, shapes = built
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    found = [problem.message for problem in problems_of(folder, shapes)]
    assert any(message in text for text in found), found


def test_a_configuration_of_another_base_is_not_taken_for_this_one(trained, base_folder, tmp_path):
    """It loads, since the real base counts; what it says of its base is wrong all the same, and a push finds it."""
    folder = shutil.copytree(trained["dora"], tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    seen = []

    def look(unfinished, shapes, card):
        seen.extend([shapes, problems_of(unfinished, shapes)])

    build(folder, tmp_path / "built", repo_id="ana/x", base_model=str(base_folder), meanwhile=look)
    shapes, problems = seen
    assert shapes is None
    assert any("is missing" in problem.message for problem in problems)
