"""results.json and verification.json: what is written is read again, and what is wrong is named."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import pytest
from publish.examples import evaluated_results, full_results, minimal_results

from minilora_hub.adapter_folder.results import Base, Results
from minilora_hub.adapter_folder.verification import Verification, is_hashed, is_loaded
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError

VERIFICATION = Verification(
    prompts=((1, 2), (3,)),
    top_tokens=((5, 6), (7,)),
    top_logits=((0.5, 0.25), (1.0,)),
    tolerance=1e-4,
    sha256={"config.json": "0" * 64},
    base_fingerprint="unknown",
    dtype="float32",
)


@pytest.mark.parametrize(
    "document",
    [full_results(), evaluated_results(), minimal_results(), VERIFICATION],
    ids=["full", "evaluated", "minimal", "verify"],
)
def test_round_trip(document, tmp_path):
    path = document.save(tmp_path)
    assert type(document).load(tmp_path) == type(document).load(path) == document
    first = path.read_bytes()
    document.save(tmp_path)
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == [document.FILE]
    assert next(iter(json.loads(first))) == "schema_version"


def changed(document, where, value):
    content = copy.deepcopy(json.loads(json.dumps(document.to_dict())))
    place = content
    for step in where[:-1]:
        place = place[step]
    if value is KeyError:
        del place[where[-1]]
    else:
        place[where[-1]] = value
    return content


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["schema_version"], 4, "schema_version=4: this minilora_hub reads versions 1 to 3"),
        (["schema_version"], KeyError, "schema_version is missing"),
        (["schema_version"], 0, "schema_version=0: must be 1 to 3"),
        (["method"], "lore", "method='lore': must be one of"),
        (["method"], KeyError, "method is missing"),
        (["metod"], "dora", "metod: there is no such field; did you mean 'method'?"),
        (["base"], "org/base", "base='org/base': should be an object"),
        (["base", "id"], 7, "base.id=7: should be a valid string"),
        (["base", "id"], " ", "base.id=' ': must not be blank"),
        (["base", "parameters"], True, "base.parameters=True: should be a valid integer"),
        (["base", "parameters"], 1.5, "base.parameters=1.5: should be a valid integer"),
        (["parameters"], 0, "parameters=0: should be greater than 0"),
        (["share"], -1, "share=-1: should be greater than 0"),
        (["language"], "en", "language='en': should be a valid array"),
        (["training", "loss", 3], [4], "training.loss[3][1] is missing"),
        (["training", "loss", 3], [1, 0.5], "training.loss="),
        (["training", "hyperparameters", "batch size"], [8], "training.hyperparameters['batch size']=[8]"),
        (["training", "seconds"], -1, "training.seconds=-1: should be greater than or equal to 0"),
        (["training", "data", 0, "items"], -5, "training.data[0].items=-5"),
        (["evaluation", 1, "value"], "high", "evaluation[1].value='high': should be a valid number"),
        (["evaluation", 1, "value"], 0.9, "evaluation[1].interval="),
        (["evaluation", 0, "n"], 0, "evaluation[0].n=0"),
        (
            ["evaluation", 0, "benchmark_task"],
            "x",
            "evaluation[0].benchmark_task='x': must be null where dataset is null",
        ),
        (["samples", 0, "prompt"], "", "samples[0].prompt=''"),
        (["expert_load", 2], [0.5, 0.6], "expert_load[2]="),
        (["expert_load", 2], [], "expert_load[2]="),
    ],
)
def test_a_wrong_field_is_named(where, value, said):
    with pytest.raises(AdapterError) as raised:
        Results.from_dict(changed(full_results(), where, value))
    assert str(raised.value).startswith("results.json: ")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["evaluation", 0, "base_interval"], [0.5, 0.6], "evaluation[0].base_interval="),
        (["evaluation", 0, "few_shot_value"], None, "evaluation[0].few_shot_interval="),
        (["evaluation", 0, "few_shot"], None, "evaluation[0].few_shot_value=0.2344: needs few_shot"),
        (["evaluation", 0, "parts", 1, "n"], 0, "evaluation[0].parts[1].n=0"),
        (["evaluation", 0, "parts", 0, "value"], 0.1, "evaluation[0].parts[0].interval="),
        (["evaluation", 1, "lower_is_better"], "yes", "evaluation[1].lower_is_better='yes': should be a valid boolean"),
        (["router", 0, "tokens"], 0, "router[0].tokens=0"),
        (["router", 1, "load", 3], [0.5, 0.6], "router[1].load[3]="),
        (["router", 1, "entropy"], [0.5], "router[1].entropy="),
        (["router", 1, "entropy", 2], 1.5, "router[1].entropy[2]="),
    ],
)
def test_a_wrong_measurement_is_named(where, value, said):
    with pytest.raises(AdapterError) as raised:
        Results.from_dict(changed(evaluated_results(), where, value))
    assert said in str(raised.value)


def test_files_of_the_first_version_are_read(tmp_path):
    """And written as the newest, which only has more fields."""
    content = json.loads(json.dumps(full_results().to_dict())) | {"schema_version": 1}
    del content["router"]
    for row in content["evaluation"]:
        for name in ("lower_is_better", "base_interval", "few_shot", "few_shot_value", "few_shot_interval", "parts"):
            del row[name]
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert Results.load(tmp_path) == full_results()
    Results.load(tmp_path).save(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["schema_version"] == 3


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["prompts"], [], "prompts="),
        (["top_logits", 0], [0.5], "top_logits="),
        (["top_tokens"], [[1]], "top_tokens="),
        (["top_tokens", 0], list(range(33)), "at most 32 items"),
        (["tolerance"], 0, "tolerance=0: should be greater than 0"),
        (["sha256", "config.json"], "abc", "sha256['config.json']"),
    ],
)
def test_a_wrong_verification_is_named(where, value, said):
    with pytest.raises(AdapterError, match=r"^verification\.json: ") as raised:
        Verification.from_dict(changed(VERIFICATION, where, value))
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ({"shape": [2, 3], "values": [1, 2]}, "values=[1, 2]: must be one number, or as many as the shape has"),
        ({"shape": [2], "values": []}, "values=[]: must be one number"),
        ({"shape": [2], "values": [1], "step": 3}, "step=3: must be null beside values, and only there"),
        ({"shape": [2]}, "step"),
        ({"shape": [2**20, 2**20], "step": 3}, "must hold at most 2 ** 26 values"),
        ({"shape": [1], "values": [2**70]}, "values"),
    ],
)
def test_a_wrong_tensor_is_named(tensor, said):
    with pytest.raises(AdapterError, match=r"^verification\.json: ") as raised:
        Verification.from_dict(changed(VERIFICATION, ["prompts", 0], {"pixel_values": tensor}))
    assert said in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b'"text"', b"{", b"\xff", b"\xef\xbb\xbf{}", b"[" * 100_000])
def test_what_is_no_results_is_refused(content, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(AdapterError, match=r"results\.json"):
        Results.load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AdapterError, match=f"{tmp_path.name}: no results.json"):
        Results.load(tmp_path)


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    minimal_results().save(tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    for broken in (Results("dora", Base("a/b"), share=float("nan")), Results("dora", Base("a/b", parameters="many"))):
        with pytest.raises(AdapterError, match=r"results\.json"):
            broken.save(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"x": {"b": 1, "c": 2, "b": 1}}', "'b' occurs twice"),
        ("[NaN]", "NaN"),
        ("[-Infinity]", "-Infinity"),
    ],
)
def test_ambiguous_json_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        strict_json(text)


def test_a_text_that_looks_like_a_list_stays_as_it_is(tmp_path):
    text = "[\n  1,\n  2\n],\n"
    minimal = Results("dora", Base("a/b", note=text))
    minimal.save(tmp_path)
    assert Results.load(tmp_path).base.note == text


def test_no_torch_is_loaded():
    module = "minilora_hub.adapter_folder.results"
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "hashed"),
    [
        ("README.md", False),
        (".gitattributes", False),
        ("verification.json", False),
        (".eval_results/org__tasks.yaml", False),
        ("LICENSE", False),
        ("NOTICE", False),
        ("peft/LICENSE", True),
        ("LICENSE.py", True),
        (".eval_results/tasks.py", True),
        ("README.md.py", True),
        ("peft/README.md", True),
        ("adapter_model.safetensors", True),
        ("results.json", True),
    ],
)
def test_what_people_edit_on_the_hub_is_not_hashed(path, hashed):
    assert is_hashed(path) == hashed


@pytest.mark.parametrize(
    ("path", "loaded"),
    [
        ("adapter_config.json", True),  # hides the class of the adapter from AutoModel
        ("processor_config.json", True),
        ("model.safetensors.index.json", True),
        ("pytorch_model.bin", True),
        ("vocab.txt", True),
        ("requirements.txt", True),  # installed by an endpoint
        ("peft/adapter_model.bin", True),
        ("custom_generate/generate.py", True),
        ("extra/helper.py", True),
        ("LICENSE", False),
        ("notes.txt", False),
        ("extra/adapter_config.json", False),
        ("pictures/loss.png", False),
    ],
)
def test_what_a_library_may_load(path, loaded):
    assert is_loaded(path) == loaded
