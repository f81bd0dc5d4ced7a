"""Adapters that a bank refuses by name, and is left as it was."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from compare.bank_models import different_prompts, run
from formats.helpers import edit_json
from safetensors.torch import load_file, save_file

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError


def test_names(bank):
    with pytest.raises(ValueError, match="name='mix': an adapter of this name is registered"):
        bank.register("mix", "anywhere")
    with pytest.raises(AdapterError, match="'nobody': not registered"), bank.use(["nobody"]):
        pass
    with pytest.raises(ValueError, match=r"names=\['nobody'\]: not in memory"), bank.rows(["nobody"]):
        pass
    with pytest.raises(AdapterError, match="'nobody': not registered"):
        bank.unload("nobody")
    with pytest.raises(ValueError, match="limit=0"):
        AdapterBank(tiny.tiny_base(), limit=0)


def test_a_damaged_adapter_leaves_the_bank_as_it_was(bank, folders, models, tmp_path):
    """Missing, surplus, misshapen, not finite: named, nothing loaded, the others unharmed."""

    def without_one(tensors):
        tensors.popitem()

    def misshapen(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name][..., :-1].contiguous()

    def not_finite(tensors):
        next(iter(tensors.values())).view(-1)[0] = float("inf")

    def surplus(tensors):
        tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_C.weight"] = torch.ones(1)

    before = [entry.name for entry in bank.list()]
    for source in ("lora", "mix", "dora"):
        for index, spoil in enumerate((without_one, misshapen, not_finite, surplus)):
            folder = tmp_path / f"{source}-{index}"
            shutil.copytree(folders[source], folder)
            tensors = load_file(folder / "adapter_model.safetensors")
            spoil(tensors)
            save_file(tensors, folder / "adapter_model.safetensors")
            named = r"missing|has shape|not finite|surplus|lora_C"
            with pytest.raises((ValueError, AdapterError), match=named):
                bank.load("damaged", folder)
    assert [entry.name for entry in bank.list()] == before
    ids = different_prompts(1)
    assert (run(bank, ["mix"], ids) - tiny.logits(models["mix"], ids)).abs().max() < 1e-4


def test_an_adapter_of_another_base_is_refused(folders):
    """By the tensor that does not fit."""
    bank = AdapterBank(tiny.tiny_base(hidden_size=48))
    for name in ("lora", "mix", "dora"):
        with pytest.raises((ValueError, AdapterError), match="has shape"):
            bank.load(name, folders[name])
    assert bank.list() == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
        ("peft_type", "IA3"),
    ],
)
def test_peft_settings_that_are_no_plain_lora_are_refused(folders, tmp_path, field, value):
    """By their name, before a tensor is read."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", **{field: value})
    with pytest.raises(AdapterError, match=f"{field}="):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora_alpha": None},
        {"lora_alpha": "8"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"rank_pattern": [1]},
        {"rank_pattern": {"(": 3}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"alpha_pattern": "q"},
        {"r": None, "rank_pattern": {".*": 4}},
        "r",
        "lora_alpha",
    ],
    ids=str,
)
def test_peft_settings_that_are_no_numbers_are_named(folders, tmp_path, changes):
    """One line with the field, and not whatever the arithmetic says."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(path.read_text())
    if isinstance(changes, str):
        field = changes
        del settings[changes]
    else:
        field = list(changes)[-1] if "r" not in changes else "r"
        settings |= changes
    path.write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=rf"\b{field}\b.*(must be|is missing)|Infinity"):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    "changes",
    [{"rank_pattern": [1]}, {"rank_pattern": {"(": 3}}, {"alpha_pattern": {"(": 3.0}}, {"lora_alpha": float("inf")}],
    ids=str,
)
def test_settings_of_ours_that_make_no_sense_are_named(folders, tmp_path, changes):
    """As for PEFT's."""
    shutil.copytree(folders["dora"], tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "config.json", **changes)
    with pytest.raises(AdapterError, match=rf"\b{next(iter(changes))}\b.*must be|Infinity is not a number"):
        AdapterBank(tiny.tiny_base()).load("adapter", tmp_path / "adapter")


def test_an_adapter_that_changes_on_disk_between_two_readings(folders, models, tmp_path):
    """What is read again is what is there: of another kind, or damaged, which only its own rows feel."""
    shutil.copytree(folders["lora"], tmp_path / "adapter")
    bank = AdapterBank(tiny.tiny_base(), limit=1)
    bank.load("changing", tmp_path / "adapter")
    bank.load("dora", folders["dora"])  # the pool holds one
    shutil.rmtree(tmp_path / "adapter")
    shutil.copytree(folders["mix"], tmp_path / "adapter")
    ids = different_prompts(3)
    names = [None, "dora", "changing"]
    together = run(bank, names, ids)
    for row, name in enumerate([None, "dora", "mix"]):
        assert (together[row] - tiny.logits(models[name], ids[row : row + 1])[0]).abs().max() < 1e-4
    assert next(entry for entry in bank.list() if entry.name == "changing").facts.kind == "MixLoRA"
