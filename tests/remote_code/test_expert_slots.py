"""The arrangements of a mixture's slots against each other: values and gradients of the same adapter."""

import pytest
import tiny
import torch

from minilora_hub.remote_code import mixture
from minilora_hub.remote_code.expert_slots import SlotsByExpert, SlotsGathered, SlotsGrouped


def arranged(monkeypatch, name, num_experts):
    """Make every mixture arrange its slots in one way."""
    makers = {
        "by expert": SlotsByExpert,
        "grouped": lambda selected, kept: SlotsGrouped(selected, num_experts),
        "gathered": lambda selected, kept: SlotsGathered(selected),
    }
    monkeypatch.setattr(mixture, "SlotsByExpert", makers[name])


def bf16_model(method, **changes):
    """Ranks and sizes of whole 16 bytes, which the grouped product needs."""
    base = tiny.tiny_base("llama", hidden_size=32, intermediate_size=48).to(torch.bfloat16)
    config = tiny.tiny_config(method, **{"r": 8, "num_experts": 4} | changes)
    model = tiny.CAUSAL_LM[method].from_base(base, config, adapter_dtype=torch.bfloat16)
    tiny.fill_adapter(model)
    return model


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("strategy", [{}, {"routing_strategy": "top_p"}, {"routing_strategy": "switch"}])
@pytest.mark.parametrize("training", [False, True])
def test_grouped_products_equal_blocks(monkeypatch, method, strategy, training):
    """In bf16, where the grouped product runs on a CPU, too; beyond its rounding. An expert may serve no token."""
    model = bf16_model(method, **strategy).train(training)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("router"):
                parameter[1] = -10 * parameter.mean(dim=0)  # an expert that hardly anybody chooses
    # One block, so that the routing is the same: through a whole model bf16's rounding would turn a close choice.
    block = model.base.model.layers[0].mlp
    x = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    upstream = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(3))
    results = {}
    for name in ("by expert", "grouped", "gathered"):
        arranged(monkeypatch, name, 4)
        block.zero_grad()
        torch.manual_seed(0)  # switch jitters its router's input in training
        with torch.set_grad_enabled(training):
            out = block(x)
        gradients = {}
        if training:
            (out.float() * upstream).sum().backward()
            parameters = [("router", block.router), *block.experts.named_parameters()]
            gradients = {name: parameter.grad.float().clone() for name, parameter in parameters}
        results[name] = (out.detach().float(), gradients)
    exact, exact_gradients = results["by expert"]
    for name in ("grouped", "gathered"):
        out, gradients = results[name]
        assert (out - exact).abs().max() < 0.02 * exact.abs().max()
        for key, gradient in gradients.items():
            scale = exact_gradients[key].abs().max()
            assert (gradient - exact_gradients[key]).abs().max() <= 0.03 * scale + 1e-6, (name, key)


def test_ends_of_the_blocks():
    """Experts without a token have blocks of no rows, the last one included."""
    slots = SlotsGrouped(torch.tensor([[2, 0], [2, 3], [0, 2]]), 6)
    assert slots.ends.tolist() == [2, 2, 5, 6, 6, 6]
    assert slots.ends.dtype == torch.int32
    assert slots.token.tolist() == [0, 2, 0, 1, 2, 1]


@pytest.mark.parametrize(
    ("changes", "dtype", "can"),
    [({}, torch.bfloat16, True), ({"r": 4}, torch.bfloat16, False), ({}, torch.float32, False)],
)
def test_what_the_grouped_product_takes(changes, dtype, can):
    """Whole 16 bytes a row, in bf16; anything else goes by blocks."""
    block = bf16_model("mixlora", **changes).to(dtype).base.model.layers[0].mlp
    assert SlotsGrouped.can(block.experts.values()) is can
