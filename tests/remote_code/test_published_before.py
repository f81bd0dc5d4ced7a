"""Repos that version 0.1.0 published, with its own code: they are known, load, verify and convert.

`published_0_1_0/` holds the Python files and the configurations of the adapters that 0.1.0 shipped. The repos are made
from them here, by that code, on a tiny base.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_stand_ins
import torch
from tiny import CAUSAL_LM, METHODS, fill_adapter
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from minilora_hub.adapter_folder.code import code_files, code_hash, release_of
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.publish.verify.verify import verify

PUBLISHED = Path(__file__).with_name("published_0_1_0")
HYPERPARAMETERS = ("r", "lora_alpha", "use_dora", "num_experts", "num_experts_per_tok", "expert_r", "expert_alpha")
PROMPTS = [[5, 80, 33], [7, 201, 64, 99, 100]]
WRITTEN_ANEW = {"transformers_version", "architectures", "auto_map"}


def published_config(method: str) -> dict:
    return json.loads((PUBLISHED / f"{method}.json").read_text(encoding="utf-8"))


def logits(model) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, -1].float() for prompt in PROMPTS]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_stand_ins.tiny_llama().save_pretrained(folder)
    tiny_stand_ins.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def repos(base_folder) -> dict[str, tuple[Path, list[torch.Tensor]]]:
    """Folders as 0.1.0 published them, and the logits that its code computed."""
    made = {}
    for method in METHODS:
        config = published_config(method)
        config_class, model_class = (
            get_class_from_dynamic_module(config["auto_map"][auto], str(PUBLISHED))
            for auto in ("AutoConfig", "AutoModelForCausalLM")
        )
        fields = {name: config[name] for name in HYPERPARAMETERS if name in config}
        model = model_class.from_base(str(base_folder), config_class(**fields)).eval()
        fill_adapter(model)
        folder = base_folder.parent / method
        model.save_pretrained(folder)
        recorded = logits(model)
        top = [row.topk(32) for row in recorded]
        verification = {
            "schema_version": 1,
            "prompts": PROMPTS,
            "top_tokens": [row.indices.tolist() for row in top],
            "top_logits": [[round(value, 6) for value in row.values.tolist()] for row in top],
            "tolerance": 0.002,
            "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()},
            "base_fingerprint": model.config.base_fingerprint,
            "dtype": "float32",
            "libraries": {"torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.8.0", "peft": "0.21.2"},
        }
        (folder / "verification.json").write_text(json.dumps(verification), encoding="utf-8")
        made[method] = folder, recorded
    return made


def test_the_code_stays_known(repos):
    assert release_of(code_hash(code_files(PUBLISHED))) == "0.1.0"
    for folder, _ in repos.values():
        assert release_of(code_hash(code_files(folder))) == "0.1.0"


@pytest.mark.parametrize("method", METHODS)
def test_configurations_are_read_and_written_alike(method):
    published = published_config(method)
    config = CAUSAL_LM[method].config_class.from_dict(dict(published))
    written = config.to_diff_dict()
    for name in published.keys() - WRITTEN_ANEW - {"text_config", "tie_word_embeddings"}:
        assert written[name] == published[name], name
    for name, value in published["text_config"].items():
        assert getattr(config.text_config, name) == (torch.bfloat16 if name == "dtype" else value), name


@pytest.mark.parametrize("method", METHODS)
def test_they_load(repos, method):
    """With the repo's own code, as AutoModel finds it, and with this version's: the same logits, bit for bit."""
    folder, recorded = repos[method]
    named = published_config(method)["auto_map"]["AutoModelForCausalLM"]
    theirs = get_class_from_dynamic_module(named, str(folder)).from_pretrained(folder)
    assert type(theirs).__module__.startswith("transformers_modules.")
    ours = CAUSAL_LM[method].from_pretrained(folder)
    for model in (theirs, ours):
        assert all(torch.equal(one, other) for one, other in zip(logits(model), recorded, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("method", [pytest.param("dora", marks=pytest.mark.slow), "mixlora"])
def test_they_verify(repos, base_folder, method):
    report = verify(repos[method][0], base_model=str(base_folder), progress=False)
    assert report.ok, report.problem
    assert "released by minilora_hub (0.1.0)" in next(step.detail for step in report.steps if step.name == "code")


@pytest.mark.parametrize(("method", "to"), [("dora", "peft"), ("dora", "dense"), ("mixlora", "mixtral")])
def test_they_convert(repos, base_folder, tmp_path, method, to):
    folder, recorded = repos[method]
    export_adapter(folder, tmp_path / to, to, base=str(base_folder))
    if to == "peft":
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(base_folder)
        converted = PeftModel.from_pretrained(base, tmp_path / to).eval()
    else:
        converted = AutoModelForCausalLM.from_pretrained(tmp_path / to).eval()
    for one, other in zip(logits(converted), recorded, strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-4)


def test_saving_again_writes_this_versions_code(repos, tmp_path):
    folder, recorded = repos["mixlora"]
    CAUSAL_LM["mixlora"].from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert release_of(code_hash(code_files(tmp_path / "new"))) == "this version"
    named = published_config("mixlora")["auto_map"]["AutoModelForCausalLM"]
    again = get_class_from_dynamic_module(named, str(tmp_path / "new")).from_pretrained(tmp_path / "new")
    assert all(torch.equal(one, other) for one, other in zip(logits(again), recorded, strict=True))
