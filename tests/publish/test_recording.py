"""The recording beside an adapter: reused while its key is the same, and never otherwise."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil

import pytest
import torch
from formats.helpers import edit_json
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minilora_hub import push
from minilora_hub.bases import resolve_base
from minilora_hub.errors import AdapterError
from minilora_hub.publish.checks.folder import check_folder
from minilora_hub.publish.push import build as build_module
from minilora_hub.publish.push.build import build
from minilora_hub.recording import document, recorded_base
from minilora_hub.recording.document import RECORDING_FILE, Recording
from minilora_hub.recording.recorded_base import why_not_reproducible
from minilora_hub.recording.reference import store_recording

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def base(base_folder, tmp_path):
    """A copy of the base, for a test to change."""
    return shutil.copytree(base_folder, tmp_path / "base")


@pytest.fixture
def loads(monkeypatch):
    """Every model that transformers was asked to load since."""
    seen, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: seen.append(args) or load(*args, **kwargs)
    )
    return seen


@pytest.fixture
def built(base, tmp_path):
    """A function that builds a folder in a new place, and says what came of it."""

    def build_again(folder, **arguments):
        out = tmp_path / f"built-{len(list(tmp_path.iterdir()))}"
        return build(folder, out, repo_id="ana/x", base_model=str(base), **arguments)

    return build_again


@pytest.fixture
def fresh(copy_of):
    """A function that copies a trained folder without its recording."""

    def copied(method="dora"):
        folder = copy_of(method)
        (folder / RECORDING_FILE).unlink(missing_ok=True)
        return folder

    return copied


def reseal(folder, **changes):
    """Change a recording and its hash."""
    dataclasses.replace(Recording.load(folder), **changes).sealed().save(folder)


@pytest.mark.parametrize(
    ("method", "layout"), [("dora", "auto"), ("dora", "peft"), ("mixlora", "auto"), ("lora", "auto")]
)
def test_the_second_build_is_the_same_and_loads_no_base(method, layout, fresh, built, loads):
    folder = fresh(method)
    first = built(folder, layout=layout)
    assert (first.recorded.reused, first.recorded.reason) == (False, f"there was no {RECORDING_FILE}")
    assert len(loads) == 1
    second = built(folder, layout=layout)
    assert second.recorded.reused
    assert len(loads) == 1
    assert second.files == first.files
    assert (second.card, second.notes) == (first.card, first.notes)
    assert RECORDING_FILE not in {file.path for file in second.files}
    problems = check_folder(second.folder, base_exists=lambda *_: True, base_license=lambda *_: "apache-2.0")
    assert not [problem for problem in problems if problem.blocking]


def scaled_weights(folder, base):
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    save_file(tensors | {name: tensors[name] * 1.5}, folder / WEIGHTS, metadata={"format": "pt"})


CHANGES = {
    "weights": scaled_weights,
    "configuration": lambda folder, base: edit_json(folder / "config.json", lora_alpha=3),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_changed_file_is_recorded_again(changed, fresh, built, base, loads):
    folder = fresh()
    before = built(folder)
    CHANGES[changed](folder, base)
    after = built(folder)
    assert (after.recorded.reused, after.recorded.reason) == (False, f"changed since it was recorded: {changed}")
    assert len(loads) == 2
    (folder / RECORDING_FILE).unlink()
    assert built(folder).files == after.files
    logits = [json.loads((made.folder / "verification.json").read_text())["top_logits"] for made in (before, after)]
    assert logits[0] != logits[1]


def other_weights(base):
    weights = load_file(base / "model.safetensors")
    name = sorted(weights)[-1]
    save_file(weights | {name: weights[name] + 0.01}, base / "model.safetensors", metadata={"format": "pt"})


def test_other_weights_of_the_base_are_refused_or_recorded_again(fresh, built, base):
    """Our format knows the base it was trained on; PEFT's has no place for that."""
    ours, pefts = fresh("mixlora"), fresh("lora")
    assert {built(folder).recorded.reused for folder in (ours, pefts)} == {False}
    other_weights(base)
    with pytest.raises(AdapterError, match=r"has fingerprint .* but the adapter was trained on"):
        built(ours)
    assert built(pefts).recorded.reason == "changed since it was recorded: base"


def test_the_same_base_elsewhere_is_the_same(fresh, built, base):
    folder = fresh("lora")
    built(folder)
    copy = base.with_name("copy")
    shutil.copytree(base, copy)
    shutil.rmtree(base)
    copy.rename(base)
    assert built(folder).recorded.reused


def test_every_part_of_the_key_counts(fresh, built):
    folder = fresh()
    built(folder)
    good = Recording.load(folder).key
    parts = {"weights", "configuration", "published code", "base", "dtype", "torch", "transformers"}
    assert good.keys() == parts
    for name in sorted(parts):
        reseal(folder, key=good | {name: "another"})
        made = built(folder)
        assert (made.recorded.reused, made.recorded.reason) == (False, f"changed since it was recorded: {name}")
    assert built(folder).recorded.reused


def test_another_version_of_the_published_code_counts(fresh, built, monkeypatch):
    folder = fresh("lora")
    built(folder)
    monkeypatch.setattr(document, "remote_code_hash", lambda: "sha256:other")
    assert built(folder).recorded.reason == "changed since it was recorded: published code"


def test_another_dtype_counts(fresh, built, monkeypatch):
    folder = fresh("lora")
    built(folder)
    monkeypatch.setattr(recorded_base, "LARGE", 0)
    assert built(folder).recorded.reason == "changed since it was recorded: dtype"


def test_every_damage_of_the_file_is_found(fresh, built):
    folder = fresh()
    built(folder)
    good, rng = Recording.load(folder), random.Random(5)
    data = (folder / RECORDING_FILE).read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (folder / RECORDING_FILE).write_bytes(damaged)
        try:
            assert Recording.load(folder) == good  # a space that became another one
        except AdapterError:
            refused += 1
    assert refused > 100
    for text in ("", "{}", "[]", data[:200].decode()):
        (folder / RECORDING_FILE).write_text(text)
        made = built(folder)
        assert not made.recorded.reused
        assert any(note.startswith(f"recorded again: {RECORDING_FILE}") for note in made.notes)
        assert (folder / RECORDING_FILE).read_bytes() == data


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda good: {"top_logits": tuple(tuple(x + 0.5 for x in row) for row in good.top_logits)}, "logits: differ"),
        (lambda good: {"peft_targets": good.peft_targets[:-1]}, "peft/: differ"),
    ],
)
@pytest.mark.slow
def test_a_forged_recording_is_caught_by_verify(change, found, hub, monkeypatch, fresh, base_folder):
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    folder = fresh()
    build(folder, folder.parent / "built", repo_id="ana/x", base_model=str(base_folder))
    reseal(folder, **change(Recording.load(folder)))
    result = push(folder, "ana/x", progress=False)
    assert result.plan.recording.reused
    assert not result.ok
    assert result.verification.problem.startswith(found), result.verification.problem


def test_weights_that_change_meanwhile_are_refused(fresh, built, base, monkeypatch):
    folder = fresh("mixlora")
    built(folder)
    write_card = build_module.write_built_card
    monkeypatch.setattr(
        build_module, "write_built_card", lambda *args: scaled_weights(folder, base) or write_card(*args)
    )
    with pytest.raises(AdapterError, match="its weights changed while it was published"):
        built(folder)


def test_a_push_of_a_trained_folder_loads_no_base(hub, monkeypatch, fresh, base_folder, loads):
    """Training leaves a recording: building, checking and sending need nothing more."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    for method in ("dora", "mixlora", "lora"):
        folder = fresh(method)
        store_recording(folder, resolve_base(base_folder))
        assert len(loads) == 1
        result = push(folder, f"ana/{method}", base_model=str(base_folder), verify=False, progress=False)
        assert result.plan.recording.reused
        assert len(loads) == 1
        loads.clear()


def test_what_was_published_before_is_computed_again(good, base_folder, tmp_path, loads):
    folder = shutil.copytree(good["mixlora"], tmp_path / "pulled")
    made = build(folder, tmp_path / "built", repo_id="ana/mixlora", base_model=str(base_folder))
    assert not made.recorded.reused
    assert "compared with its recorded logits" in made.recorded.reason
    assert len(loads) == 1
    assert not (folder / RECORDING_FILE).exists()


def test_a_folder_that_takes_no_file(fresh, built):
    folder = fresh()
    (folder / RECORDING_FILE).mkdir()
    made = built(folder)
    assert not made.recorded.reused
    assert any("cannot be stored" in note for note in made.notes)


def test_a_quantised_base(base, fresh, built):
    """With bitsandbytes it is recorded as it is; what another library computes is asked again each time."""
    from peft import LoraConfig, get_peft_model
    from tiny_training import write_base
    from transformers import BitsAndBytesConfig

    shutil.rmtree(base)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(write_base(base)), LoraConfig(r=2, init_lora_weights=False)
    )
    folder = fresh("lora")
    adapted.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path="org/base")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    model.save_pretrained(base)
    first, second = built(folder), built(folder)
    assert (first.recorded.reused, second.recorded.reused) == (False, True)
    assert second.files == first.files
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "gptq"
    assert why_not_reproducible(resolve_base(base), "sha256:0") is None
    (base / "config.json").write_text(json.dumps(config))
    assert why_not_reproducible(resolve_base(base), "sha256:0") == "the base is quantised (gptq)"


def test_a_base_whose_weights_nobody_knows(base):
    assert why_not_reproducible(resolve_base(base), "unknown") == "the base's weights have no fingerprint"
    (base / "adapter_config.json").write_text("{}")
    assert why_not_reproducible(resolve_base(base), "sha256:0") == "the base has an adapter of its own"


def test_the_command_tells(hub, monkeypatch, fresh, base_folder, capsys):
    from minilora_hub.cli import main

    monkeypatch.setenv("HF_TOKEN", hub.add_user("ana"))
    folder = fresh()
    told = []
    for _ in range(2):
        monkeypatch.setattr("sys.argv", ["minilora", "push", str(folder), "ana/x", "--dry-run", "--json"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        told.append(json.loads(capsys.readouterr().out)["recording"])
    assert [recording["reused"] for recording in told] == [False, True]
    assert told[0]["reason"] == f"there was no {RECORDING_FILE}"
    monkeypatch.setattr("sys.argv", ["minilora", "push", str(folder), "ana/x", "--dry-run"])
    with pytest.raises(SystemExit):
        main()
    assert f"reference logits: reused, nothing that {RECORDING_FILE} depends on" in capsys.readouterr().out
