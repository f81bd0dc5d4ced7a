"""Adapters for every task: pushed to a Hub, verified, and used as their cards say by a process without minilora_hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from formats.helpers import edit_json
from tiny import fill_adapter, tiny_config
from tiny_processors import CLASSES, KINDS, processor_of, write_base

from minilora_hub import push
from minilora_hub.adapter_folder.names import PROCESSING
from minilora_hub.adapter_folder.verification import Verification, plain_prompts
from minilora_hub.errors import AdapterError
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push.build import build
from minilora_hub.publish.verify.isolated_process import IsolatedProcess
from minilora_hub.publish.verify.verify import verify
from minilora_hub.recording import model_outputs
from minilora_hub.remote_code.modeling_minilora import adapted_class

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
CARDS_AND_PIPELINES = r"""
import sys
sys.modules["minilora_hub"] = None  # importing it fails, as where it is not installed
import ast, contextlib, io, json, re, types
import torch
from huggingface_hub import hf_hub_download
from transformers import pipeline

torch.set_num_threads(1)

def words(text): return " ".join(text.split())

CALLS = {  # task -> the pipeline's answer and the one of the card's model
    "text-classification": lambda run, n: (
        {row["label"]: row["score"] for row in run("Hello!", top_k=None)},
        dict(zip(n.model.config.id2label.values(), n.model(**n.inputs).logits.softmax(-1)[0].tolist()))),
    "token-classification": lambda run, n: (
        [row["entity"] for row in run("Hello!", ignore_labels=[])], ast.literal_eval(n.said)),
    "fill-mask": lambda run, n: (
        run(n.tokenizer.decode(n.inputs["input_ids"][0]))[0]["token"],
        n.model(**n.inputs).logits[n.inputs["input_ids"] == n.tokenizer.mask_token_id].argmax().item()),
    "feature-extraction": lambda run, n: (
        torch.tensor(run("Hello!"))[0].flatten().tolist(), n.model(**n.inputs).last_hidden_state.flatten().tolist()),
    "automatic-speech-recognition": lambda run, n: (
        words(run({"raw": n.sound, "sampling_rate": n.rate})["text"]) and run.model.generate(**n.inputs)[0].tolist(),
        n.answer[0].tolist()) if hasattr(n, "answer") else (  # its tokens are no text
        words(run({"raw": n.sound, "sampling_rate": n.rate})["text"]), words(n.said)),
    "audio-classification": lambda run, n: ([run(n.sound)[0]["label"]], ast.literal_eval(n.said)),
    "image-classification": lambda run, n: ([run(n.image)[0]["label"]], ast.literal_eval(n.said)),
    "zero-shot-image-classification": lambda run, n: (
        {row["label"]: row["score"]
         for row in run(n.image, candidate_labels=n.labels, hypothesis_template="{}")}, ast.literal_eval(n.said)),
    "image-text-to-text": lambda run, n: (
        words(run(text=[{"role": "user", "content": n.content}], max_new_tokens=48, return_full_text=False)
              [0]["generated_text"]), words(n.said)),
    "question-answering": None,  # transformers 5 has no pipeline for these two
    "text2text-generation": None,
}
for repo in sys.argv[1:]:
    card = open(hf_hub_download(repo, "README.md"), encoding="utf-8").read()
    task = re.search(r"^pipeline_tag: (.*)$", card, re.MULTILINE)[1]
    names, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said), torch.no_grad():
        exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)
        names = types.SimpleNamespace(**names, said=said.getvalue().strip())
        assert type(names.model).__module__.startswith("transformers_modules."), repo
        found = None
        if CALLS[task]:
            found = CALLS[task](pipeline(task, model=repo, trust_remote_code=True), names)
    print("RESULT", json.dumps([repo, task, names.said, found]))
"""


def adapter(auto_name, folder):
    """(base, folder of a trained adapter on it, the trained model)."""
    base = write_base(auto_name, folder / "base")
    labels = CLASSES if "Classification" in auto_name and "Zero" not in auto_name else {}
    towers = "all" if KINDS[auto_name] == "clip" else None
    model = adapted_class("Dora", auto_name).from_base(str(base), tiny_config("dora", towers=towers), **labels)
    fill_adapter(model)
    model.eval().save_pretrained(folder / "trained", tokenizer=processor_of(KINDS[auto_name]))
    return base, folder / "trained", model


@pytest.mark.slow
def test_pushed_verified_and_used_as_the_card_says(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    monkeypatch.chdir(tmp_path)
    repos = {}
    with IsolatedProcess() as process:  # of this Hub
        for auto_name in KINDS:
            short = auto_name.removeprefix("AutoModelFor").removeprefix("Auto").lower()
            base, folder, _ = adapter(auto_name, tmp_path / short)
            edit_json(folder / "config.json", base_model_name_or_path=f"org/{short}")
            files = {path.name: path.read_bytes() for path in base.iterdir()}
            hub.add_repo(f"org/{short}", files=files | {"README.md": b"---\nlicense: mit\n---\n"})
            repos[auto_name] = f"ana/{short}"
            push(folder, repos[auto_name], license="mit", private=False, verify=False, progress=False)
            report = verify(repos[auto_name], process=process, progress=False)
            assert report.ok, (auto_name, report.problem)
            assert report.difference < 1e-5
    done = subprocess.run(
        [sys.executable, "-c", CARDS_AND_PIPELINES, *repos.values()], env=os.environ, cwd=tmp_path, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line[7:]) for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert [line[0] for line in lines] == list(repos.values())
    for repo, task, said, both in lines:
        assert said or task in ("question-answering", "text2text-generation", "fill-mask"), repo
        if both is not None:
            same = isinstance(both[0], (str, list)) and isinstance(both[0][0], str)
            assert both[0] == (both[1] if same else pytest.approx(both[1], abs=1e-5)), repo


@pytest.mark.parametrize("auto_name", [
    "AutoModelForImageClassification",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("AutoModelForImageTextToText", "AutoModelForCTC")),
])  # fmt: skip
def test_recorded_on_what_the_processor_makes(auto_name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, model = adapter(auto_name, tmp_path)
    settings = {"repo_id": "ana/x", "base_id": "org/base", "license": "mit", "base_model": str(base)}
    built = build(folder, tmp_path / "built", **settings)
    verification = Verification.load(built.folder)
    assert json.loads((built.folder / "verification.json").read_text())["schema_version"] == 2
    assert {path.name for path in built.folder.iterdir()} & {*PROCESSING}
    prompt = verification.prompts[0]
    assert {name for name, tensor in prompt.items() if tensor.step} == {model.base.main_input_name} - {"input_ids"} or {
        "pixel_values"
    }
    if auto_name == "AutoModelForImageTextToText":  # 16 patches of a picture in the prompt
        assert prompt["input_ids"].values.count(model.base.config.image_token_id) == 16
    with torch.no_grad():
        inputs = [model_outputs.arguments_of(model, prompt) for prompt in plain_prompts(verification.prompts)]
        rows = [model(**given).logits.flatten(0, -2)[-1] for given in inputs]
    for row, tokens, logits in zip(rows, verification.top_tokens, verification.top_logits, strict=True):
        torch.testing.assert_close(row[list(tokens)], torch.tensor(logits), rtol=0, atol=1e-5)
    assert len(set(verification.top_logits)) == 3
    again = build(folder, tmp_path / "again", **settings)
    assert again.recorded.reused
    assert again.files == built.files


def test_a_folder_without_its_processor_is_not_published(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, _ = adapter("AutoModelForImageClassification", tmp_path)
    for place in (base, folder):
        (place / "preprocessor_config.json").unlink()
    settings = {"repo_id": "ana/x", "base_id": "org/base", "license": "mit", "base_model": str(base)}
    built = build(folder, tmp_path / "built", **settings)
    problems = check_folder(built.folder, base_exists=lambda *_: True, base_license=lambda *_: "mit")
    assert [(p.code, p.message) for p in problems if p.blocking] == [
        ("missing-file", f"no processor for image: one of {', '.join(PROCESSING)} is needed")
    ]


def test_a_processor_that_does_not_load_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, _ = adapter("AutoModelForImageClassification", tmp_path)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuchProcessor"}')
    settings = {"repo_id": "ana/x", "base_id": "org/base", "license": "mit", "base_model": str(base)}
    built = build(folder, tmp_path / "built", **settings)
    assert any(note.startswith("recorded without the processor, on other inputs") for note in built.notes)


def test_a_processor_of_the_base_belongs_to_a_tokenizer_of_the_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, model = adapter("AutoModelForImageTextToText", tmp_path)
    for name in PROCESSING:
        (folder / name).unlink(missing_ok=True)
    assert (folder / "tokenizer.json").is_file()
    settings = {"repo_id": "ana/x", "base_id": "org/base", "license": "mit", "base_model": str(base)}
    built = build(folder, tmp_path / "built", **settings)
    assert {path.name for path in built.folder.iterdir()} & {*PROCESSING}
    assert not any("without the processor" in note for note in built.notes)
    prompt = Verification.load(built.folder).prompts[0]
    assert prompt["input_ids"].values.count(model.base.config.image_token_id) == 16


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("input_ids", {"values": [10**6]}, "nan"),
        ("pixel_values", {"shape": [1, 2, 3]}, "verification.json: the model cannot be called with its prompts"),
    ],
)
def test_recorded_inputs_that_do_not_fit_the_model(name, changed, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base, folder, _ = adapter("AutoModelForImageTextToText", tmp_path)
    settings = {"repo_id": "ana/x", "base_id": "org/base", "license": "mit", "base_model": str(base)}
    published = build(folder, tmp_path / "built", **settings).folder
    before = Verification.load(published).to_dict()
    before["prompts"] = plain_prompts(Verification.from_dict(before).prompts)
    before["prompts"][0][name].update(changed)
    (published / "verification.json").write_text(json.dumps(before))
    with pytest.raises(AdapterError, match=said):
        build(published, tmp_path / "again", **settings)
