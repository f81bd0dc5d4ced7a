"""Encoder-decoders are adapted in both of their parts."""

import copy

import pytest
import torch
from tiny import fill_adapter, tiny_config, token_ids
from tiny_architectures import tiny_encoder_decoder
from transformers import T5Config, T5EncoderModel

from minilora_hub import DoraConfig, DoraForCausalLM
from minilora_hub.remote_code.base_structure import plan_sites
from minilora_hub.remote_code.layer_stacks import find_layer_stacks, linears_in
from minilora_hub.remote_code.linear_layers import linear_shape

NAMES = ("t5", "mt5", "bart", "marian", "whisper")


def inputs_of(base) -> dict[str, torch.Tensor]:
    ids = token_ids()
    if base.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)), "labels": ids}
    return {"input_ids": ids, "labels": ids.flip(1)}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("mt5", "marian"))) for name in NAMES]
)
def test_both_parts_get_adapters_that_learn(name):
    base = tiny_encoder_decoder(name)
    plain, inputs = copy.deepcopy(base), inputs_of(base)
    model = DoraForCausalLM.from_base(base, DoraConfig(r=4))
    linears = {path for path, module in plain.named_modules() if linear_shape(module) and ".layers." in f".{path}"}
    linears |= {path for path, module in plain.named_modules() if linear_shape(module) and ".block." in path}
    assert {site.path for site in model.sites} == linears
    stacks = find_layer_stacks(plain)
    assert [(stack, len(layers)) for stack, (_, layers) in stacks.items()] == [
        ("encoder.layers", 2),
        ("decoder.layers", 3),
    ]
    assert {site.name.split(".layers.")[0] for site in model.sites} == {"encoder", "decoder"}
    with torch.no_grad():
        expected = plain(**inputs).logits
        torch.testing.assert_close(base(**inputs).logits, expected, rtol=0, atol=1e-5)
        fill_adapter(model)
        assert (base(**inputs).logits - expected).abs().max() > 0.01
    base(**inputs).loss.backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters().values())


def test_a_target_may_name_one_part():
    base = tiny_encoder_decoder("bart")
    sites = plan_sites(base, DoraConfig(target_modules=["encoder.layers.1.self_attn.q_proj", "encoder_attn.q_proj"]))
    assert [site.name for site in sites] == [
        "encoder.layers.1.self_attn.q_proj",
        *(f"decoder.layers.{index}.encoder_attn.q_proj" for index in range(3)),
    ]


def test_mixtures_go_into_one_list_of_layers():
    with pytest.raises(ValueError, match=r"goes into one list of layers, not \['encoder\.layers', 'decoder\.layers'\]"):
        plan_sites(tiny_encoder_decoder("t5"), tiny_config("mixlora"))
    with pytest.raises(ValueError, match=r"encoder\.layers\.0 .*: no feed-forward block of a known form"):
        plan_sites(tiny_encoder_decoder("bart"), tiny_config("mixlora", towers=["encoder"]))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_block_with_a_dropout_within_is_refused(rate):
    """It does nothing in evaluation, but a mixture would drop at another place in training."""
    base = T5EncoderModel(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=rate))
    if not rate:
        assert sum(hasattr(site, "structure") for site in plan_sites(base, tiny_config("mixlora"))) == 2
        return
    with pytest.raises(ValueError, match=r"encoder\.block\.0 .*: no feed-forward block of a known form"):
        plan_sites(base, tiny_config("mixlora"))


def test_the_encoder_alone_is_a_base_with_one_list():
    base = T5EncoderModel(tiny_encoder_decoder("t5").config)
    stacks = find_layer_stacks(base)
    assert list(stacks) == ["layers"]
    assert all(linears_in(layer) for layer in stacks["layers"][1])


def test_a_part_with_two_lists_of_layers_is_refused_by_their_paths():
    base = tiny_encoder_decoder("bart")
    base.model.encoder.others = copy.deepcopy(base.model.encoder.layers)
    with pytest.raises(ValueError, match=r"its encoder must have one list of layers.*\['layers', 'others'\]"):
        find_layer_stacks(base)
