"""Names of one adapter's tensors in both dialects."""

from __future__ import annotations

import pytest

from minilora_hub.tensor_names import as_stock_transformers_reads, from_peft, to_peft


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
