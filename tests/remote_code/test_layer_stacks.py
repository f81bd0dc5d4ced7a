"""Encoder-decoders are adapted in both of their parts; mixtures keep the dropouts of their blocks in place."""

import copy

import pytest
import torch
from reference import plain_mixture
from tiny import fill_adapter, tiny_config, token_ids
from tiny_architectures import tiny_encoder_decoder
from tiny_heads import tiny_head
from transformers import T5Config, T5EncoderModel

from minilora_hub import DoraConfig, DoraForCausalLM
from minilora_hub.remote_code.attach import attach
from minilora_hub.remote_code.base_structure import MixtureSite, plan_sites
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


BLOCKS = {
    "two linears, a dropout within": lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="relu")),
    "gated, a dropout within": lambda: T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")),
    "a dropout within, another after": lambda: tiny_head("wav2vec2", "AutoModelForCTC"),
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "dropout_rate": 0.1}


def mixture_on(base, **changes):
    """The mixture of the first layer, in training, with the structure of its block."""
    config = tiny_config("mixlora", **changes)
    sites = plan_sites(base, config)
    attach(base, config, sites)
    site = next(site for site in sites if isinstance(site, MixtureSite))
    return base.get_submodule(site.path).train()


@pytest.mark.parametrize("form", BLOCKS)
def test_a_dropout_within_a_block_drops_where_it_did(form):
    """In evaluation a dropout does nothing, wherever it is. In training a fresh expert is the block, drops included."""
    module = mixture_on(BLOCKS[form](), num_experts=1, num_experts_per_tok=1)
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    expected = module.base_block(x)
    torch.manual_seed(1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)
    assert (module.base_block(x) - expected).abs().max() > 0.01  # other values are dropped


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("form", BLOCKS)
def test_each_expert_drops_within_its_own_computation(form, use_dora):
    """What the dropouts keep is fixed here, so that it can be written into the weights of the equations."""
    base = BLOCKS[form]()
    module = mixture_on(base, num_experts=4, num_experts_per_tok=2, use_dora=use_dora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for update in module.experts.values():
            update.lora_B.normal_(0, 0.3, generator=generator)
    x = torch.randn(1, 9, 32, generator=generator)
    output = module.base_block.get_submodule(module.structure.output)
    kept = torch.rand(output.in_features, generator=generator) * 2
    kept_after = torch.rand(output.out_features, generator=generator) * 2
    module.structure.inner.register_forward_hook(lambda *call: call[1][0] * kept)
    if isinstance(module.structure.dropout, torch.nn.Dropout):
        module.structure.dropout.register_forward_hook(lambda *call: call[1][0] * kept_after)
    else:
        kept_after = 1.0
    got = module(x)[0]
    written = copy.deepcopy(module)
    with torch.no_grad():
        update = written.experts[module.structure.output]
        layer = written.base_block.get_submodule(module.structure.output)
        norms = (layer.weight + update.scaling * update.lora_B @ update.lora_A).norm(dim=-1)
        layer.weight *= kept
        update.lora_A *= kept
        if use_dora:  # whose norm knows nothing of what is dropped
            update.magnitude *= (layer.weight + update.scaling * update.lora_B @ update.lora_A).norm(dim=-1) / norms
    torch.testing.assert_close(got, plain_mixture(written, x[0]) * kept_after, rtol=0, atol=1e-5)


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
