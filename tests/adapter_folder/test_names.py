"""Names of one adapter's tensors in both dialects."""

from __future__ import annotations

import pytest

from minilora_hub.adapter_folder.names import (
    as_stock_transformers_reads,
    canonical_of_peft_mixlora,
    from_peft,
    to_peft,
    to_peft_mixlora,
)


@pytest.mark.parametrize("layers", ["model.layers", "transformer.h"])
@pytest.mark.parametrize("leaf", ["lora_A", "lora_B", "magnitude"])
def test_there_and_back(layers, leaf):
    name = f"layers.11.self_attn.q_proj.{leaf}"
    peft = to_peft(name, layers)
    assert peft.startswith(f"base_model.model.{layers}.11.self_attn.q_proj.lora_")
    assert from_peft(peft, layers) == name
    assert as_stock_transformers_reads(peft) == peft


def test_peft_s_own_spelling_of_a_magnitude():
    own = "base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"
    assert from_peft(own, "model.layers") == "layers.0.mlp.up_proj.magnitude"
    assert to_peft("layers.0.mlp.up_proj.magnitude", "model.layers") == f"{own}.weight"
    assert as_stock_transformers_reads(own) == f"{own}.weight"


@pytest.mark.parametrize("name", ["layers.0.mlp.router", "layers.0.mlp.experts.up_proj.lora_A", "lm_head.lora_A", "x"])
def test_what_peft_has_no_name_for(name):
    with pytest.raises(ValueError, match=name):
        to_peft(name, "model.layers")


@pytest.mark.parametrize("name", ["base_model.model.lm_head.lora_A.weight", "model.layers.0.q.weight"])
def test_what_is_not_in_the_layers(name):
    with pytest.raises(ValueError, match=name):
        from_peft(name, "model.layers")


MIXLORA_PAIRS = {
    "layers.0.mlp.router": "base_model.model.model.layers.0.mlp.moe_lora.router",
    "layers.11.mlp.experts.up_proj.lora_A": "base_model.model.model.layers.11.mlp.moe_lora.experts.up_proj.lora_A",
    "layers.1.mlp.experts.down_proj.magnitude": (
        "base_model.model.model.layers.1.mlp.moe_lora.experts.down_proj.lora_magnitude_vector"
    ),
    "layers.2.self_attn.q_proj.lora_B": "base_model.model.model.layers.2.self_attn.q_proj.moe_lora.update.lora_B",
    "layers.2.self_attn.q_proj.magnitude": (
        "base_model.model.model.layers.2.self_attn.q_proj.moe_lora.update.lora_magnitude_vector"
    ),
}


@pytest.mark.parametrize(("canonical", "peft"), MIXLORA_PAIRS.items())
def test_a_mixlora_as_a_peft_method(canonical, peft):
    assert to_peft_mixlora(canonical, "model.layers") == peft
    assert canonical_of_peft_mixlora(peft) == canonical
    assert canonical_of_peft_mixlora(peft.removeprefix("base_model.model.")) == canonical
    elsewhere = to_peft_mixlora(canonical, "transformer.h")
    assert elsewhere.startswith("base_model.model.transformer.h.")
    assert canonical_of_peft_mixlora(elsewhere) == canonical


@pytest.mark.parametrize("name", ["model.layers.0.mlp.router", "layers.0.mlp.weight", "router"])
def test_what_is_no_canonical_name_of_a_mixlora_is_refused(name):
    with pytest.raises(ValueError, match="not a canonical tensor name"):
        to_peft_mixlora(name, "model.layers")


def test_what_is_no_mixlora_of_pefts_is_refused():
    for name in ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", "moe_lora.router", "layers.0.mlp.router"):
        with pytest.raises(ValueError, match="not a tensor of a MixLoRA in PEFT's layout"):
            canonical_of_peft_mixlora(name)
