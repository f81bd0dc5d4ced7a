"""A MixLoRA between our folder and PEFT's layout: the same tensors, the same adapter, in both directions."""

from __future__ import annotations

import json

import pytest
import torch
from formats.helpers import peft_mixlora_folder
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, logits, tiny_base, tiny_config

from minilora_hub import MixLoraConfig, MixLoraForCausalLM, register
from minilora_hub.errors import AdapterError
from minilora_hub.formats.exporting import export_adapter
from minilora_hub.formats.importing import import_adapter
from minilora_hub.remote_code.adapter_files import ADAPTER_FILE

register()

CASES = {
    "plain": {},
    "other experts": {"expert_r": 2, "expert_alpha": 5, "lora_dropout": 0.1, "num_experts_per_tok": 3},
    "mixdora": {"use_dora": True, "use_rslora": True},
    "some targets": {"target_modules": ["self_attn.v_proj", "up_proj"]},
    "patterns": {"rank_pattern": {"layers.1.self_attn.q_proj": 3}, "alpha_pattern": {"down_proj": 1.5}},
    "top_p": {"routing_strategy": "top_p", "router_top_p": 0.6, "router_temperature": 0.7},
    "switch": {"routing_strategy": "switch", "expert_capacity": 5, "router_z_loss_coef": 0.01, "expert_dropout": 0.2},
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    return folder


def saved(base_folder, out, method="mixlora", **changes):
    model = MixLoraForCausalLM.from_base(str(base_folder), tiny_config(method, **changes))
    fill_adapter(model)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("case", CASES)
def test_there_and_back(case, base_folder, tmp_path):
    model = saved(base_folder, tmp_path / "ours", **CASES[case])
    peft_mixlora_folder(tmp_path / "ours", tmp_path / "peft")
    peft_model = PeftModel.from_pretrained(tiny_base(), tmp_path / "peft")
    assert torch.equal(logits(peft_model), logits(model))

    import_adapter(tmp_path / "peft", tmp_path / "again")
    ours, again = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) and ours[name].dtype == again[name].dtype for name in ours)
    before, after = (MixLoraConfig.from_pretrained(tmp_path / name).to_diff_dict() for name in ("ours", "again"))
    if "target_modules" in CASES[case]:  # shortened names come back as they are within a layer
        before["target_modules"] = ["up_proj", "v_proj"]
    assert after == before
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(loaded), logits(model))


def test_a_peft_layout_saved_by_peft_becomes_ours(base_folder, tmp_path):
    saved(base_folder, tmp_path / "ours")
    peft_mixlora_folder(tmp_path / "ours", tmp_path / "peft")
    PeftModel.from_pretrained(tiny_base(), tmp_path / "peft").save_pretrained(tmp_path / "resaved")
    import_adapter(tmp_path / "resaved", tmp_path / "again", base=str(base_folder))
    ours, again = (load_file(tmp_path / name / ADAPTER_FILE) for name in ("ours", "again"))
    assert ours.keys() == again.keys()
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_the_reference_reads_the_configuration(base_folder, tmp_path):
    from mixlora.config import MixLoraConfig as Reference

    saved(base_folder, tmp_path / "ours", expert_r=2)
    peft_mixlora_folder(tmp_path / "ours", tmp_path / "peft")
    fields = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    fields["task_type"], fields["lora_alpha"] = "CAUSAL_LM", int(fields["lora_alpha"])
    read = Reference.from_config(fields)
    assert (read.num_experts_, read.top_k_, read.lora_r_, read.expert_config_.lora_r_) == (4, 2, 4, 2)
    assert read.target_modules_["gate_proj"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda tensors: tensors.pop("layers.1.mlp.router"), r"missing layers\.1\.mlp\.router"),
        (lambda tensors: tensors.update({"layers.9.mlp.router": torch.zeros(4, 32)}), r"layers\.9\.mlp\.router"),
        (
            lambda tensors: tensors.update({"layers.0.mlp.router": torch.zeros(5, 32)}),
            r"layers\.0\.mlp\.router has shape \(5, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(spoil, message, base_folder, tmp_path):
    saved(base_folder, tmp_path / "ours")
    tensors = load_file(tmp_path / "ours" / ADAPTER_FILE)
    spoil(tensors)
    save_file(tensors, tmp_path / "ours" / ADAPTER_FILE)
    with pytest.raises(AdapterError, match=message):
        export_adapter(tmp_path / "ours", tmp_path / "peft", "peft")
    assert not (tmp_path / "peft").exists()


def test_what_ours_cannot_say_is_named(base_folder, tmp_path):
    from peft import get_peft_model

    from minilora_hub import MixLoraPeftConfig

    for name, arguments, message in (
        ("saved", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("layers", {"layers_to_transform": [0]}, "layers_to_transform"),
        ("dropout", {"expert_lora": {"lora_dropout": 0.3}}, "lora_dropout=0.3"),
    ):
        base = tiny_base()
        base.name_or_path = str(base_folder)
        get_peft_model(base, MixLoraPeftConfig(r=4, num_experts=4, **arguments)).save_pretrained(tmp_path / name)
        with pytest.raises(AdapterError, match=message):
            import_adapter(tmp_path / name, tmp_path / "out")
    with pytest.raises(AdapterError, match="convert it with `minilora import` first"):
        export_adapter(tmp_path / "saved", tmp_path / "out", "peft")
    with pytest.raises(AdapterError, match="a whole model"):
        import_adapter(base_folder, tmp_path / "out")
    with pytest.raises(AdapterError, match="empty"):
        export_adapter(base_folder, base_folder, "peft")
