"""LoRA and DoRA against PEFT, elementwise and live, at dropout 0; against a plain reference at dropout > 0."""

import copy

import pytest
import torch
from reference import peft_twin
from tiny import FAMILIES, fill_adapter, logits, tiny_base, tiny_config, token_ids
from torch.nn import functional as F

from minilora_hub import DoraForCausalLM
from minilora_hub.remote_code.adapted_linear import AdaptedLinear
from minilora_hub.remote_code.attach import adapter_parameters, attach
from minilora_hub.remote_code.base_structure import plan_sites

SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*\.v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "one target": {"target_modules": ["v_proj"]},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dora_logits_equal_pefts(family, setting):
    base = tiny_base(family, biases=True)
    model = DoraForCausalLM.from_base(copy.deepcopy(base), tiny_config("dora", **SETTINGS[setting]))
    fill_adapter(model)
    twin = peft_twin(copy.deepcopy(base), model.adapter_parameters(), model.config)
    assert (logits(model) - logits(base)).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dora_logits_equal_pefts_on_every_family(family):
    base = tiny_base(family, biases=True)
    model = DoraForCausalLM.from_base(copy.deepcopy(base), tiny_config("dora"))
    fill_adapter(model)
    twin = peft_twin(copy.deepcopy(base), model.adapter_parameters(), model.config)
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-4)


@pytest.mark.parametrize("setting", SETTINGS)
def test_lora_logits_equal_pefts(setting):
    """Plain LoRA has no class of its own; it is the same modules without a magnitude."""
    base = tiny_base("qwen2", biases=True)
    config = tiny_config("dora", **SETTINGS[setting])
    config.use_dora = False
    adapted = copy.deepcopy(base)
    sites = plan_sites(adapted, config)
    attach(adapted, config, sites)
    torch.testing.assert_close(logits(adapted), logits(base), rtol=0, atol=1e-5)
    parameters = adapter_parameters(adapted, sites)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(0, 0.2)
    twin = peft_twin(copy.deepcopy(base), parameters, config)
    torch.testing.assert_close(logits(adapted), logits(twin), rtol=0, atol=1e-4)


def test_dora_gradients_equal_pefts():
    base = tiny_base("llama", biases=True)
    model = DoraForCausalLM.from_base(copy.deepcopy(base), tiny_config("dora"))
    fill_adapter(model)
    twin = peft_twin(copy.deepcopy(base), model.adapter_parameters(), model.config)
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    twin(input_ids=ids, labels=ids).loss.backward()
    theirs = dict(twin.named_parameters())
    for name, parameter in model.adapter_parameters().items():
        path, leaf = name.rsplit(".", 1)
        ending = {"lora_A": "lora_A", "lora_B": "lora_B", "magnitude": "lora_magnitude_vector"}[leaf]
        other = theirs[f"base_model.model.model.{path}.{ending}.default.weight"]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_dora_with_dropout_equals_a_plain_reference_with_the_same_mask():
    """Dropout acts on the low-rank path only: c * (W x + s B A drop(x)) + b."""
    model = DoraForCausalLM.from_base(tiny_base("llama", biases=True), tiny_config("dora", lora_dropout=0.4))
    fill_adapter(model)
    model.train()
    seen = 0
    for module in model.modules():
        if not isinstance(module, AdaptedLinear):
            continue
        seen += 1
        x = torch.randn(3, 5, module.in_features)
        torch.manual_seed(7)
        got = module(x)
        torch.manual_seed(7)
        dropped = F.dropout(x, 0.4, training=True)
        assert not torch.equal(dropped, x)
        update, weight, bias = module.update, module.weight, module.bias
        product = update.scaling * update.lora_B @ update.lora_A
        scale = update.magnitude / (weight + product).norm(dim=1)
        expected = scale * (x @ weight.T + dropped @ product.T)
        expected = expected if bias is None else expected + bias
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert seen == 14


def test_the_norm_is_detached_from_the_gradient():
    """Section 4.3 of the paper: the norm counts as a constant in backward."""
    model = DoraForCausalLM.from_base(tiny_base(), tiny_config("dora"))
    fill_adapter(model)
    module = next(m for m in model.modules() if isinstance(m, AdaptedLinear))
    x, update, weight = torch.randn(4, module.in_features), module.update, module.weight
    module(x).square().sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (update.lora_A, update.lora_B, update.magnitude))
    product = update.scaling * b @ a
    scale = m / (weight + product).norm(dim=1).detach()
    (scale * (x @ weight.T + x @ product.T)).square().sum().backward()
    for ours, plain in ((update.lora_A, a), (update.lora_B, b), (update.magnitude, m)):
        torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["in place", "through data", "optimizer", "load_state_dict"])
def test_the_inference_cache_is_dropped_when_weights_change(change):
    model = DoraForCausalLM.from_base(tiny_base(), tiny_config("dora"))
    fill_adapter(model)
    before = logits(model)
    assert torch.equal(logits(model), before)
    parameters = model.adapter_parameters()
    if change == "in place":
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.mul_(1.5)
    elif change == "through data":
        for parameter in parameters.values():
            parameter.data = parameter.data * 1.5
    elif change == "optimizer":
        ids = token_ids()
        optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    else:
        state = {name: value * 1.5 for name, value in model.state_dict().items() if "update" in name}
        model.load_state_dict(state, strict=False)
    cached = logits(model)
    assert not torch.allclose(cached, before)
    fresh = copy.deepcopy(model)
    for module in fresh.modules():
        if isinstance(module, AdaptedLinear):
            module.update._scale_cache = (None, None)
    assert torch.equal(cached, logits(fresh))


def test_the_inference_cache_is_one_vector_per_layer():
    model = DoraForCausalLM.from_base(tiny_base(), tiny_config("dora"))
    logits(model)
    for module in model.modules():
        if isinstance(module, AdaptedLinear):
            assert module.update._scale_cache[1].shape == (module.out_features,)
