"""The arrangements of a mixture's slots against each other: values and gradients of the same adapter."""

import pytest
import tiny
import torch

from minilora_hub.remote_code import mixture
from minilora_hub.remote_code.device_slots import SlotsGathered, SlotsGrouped, SlotsOfTraining
from minilora_hub.remote_code.expert_slots import SlotsByExpert, SlotsMasked


def arranged(monkeypatch, name, num_experts):
    """Make every mixture arrange its slots in one way."""
    makers = {
        "by expert": SlotsByExpert,
        "grouped": lambda selected, kept: SlotsGrouped(selected, num_experts),
        "gathered": lambda selected, kept: SlotsGathered(selected),
        "masked": lambda selected, kept: SlotsMasked(selected, num_experts),
        "training": lambda selected, kept: SlotsOfTraining(selected, num_experts),
    }
    monkeypatch.setattr(SlotsMasked, "WIDE", 0)  # or these would be taken before the one asked for
    monkeypatch.setattr(SlotsOfTraining, "can", lambda updates: False)
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
    for name in ("by expert", "grouped", "gathered", "masked"):
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
    for name in ("grouped", "gathered", "masked"):
        out, gradients = results[name]
        assert (out - exact).abs().max() < 0.02 * exact.abs().max()
        for key, gradient in gradients.items():
            scale = exact_gradients[key].abs().max()
            assert (gradient - exact_gradients[key]).abs().max() <= 0.03 * scale + 1e-6, (name, key)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("training", [False, True])
def test_one_masked_product_equals_blocks(monkeypatch, method, training):
    """In fp32, over many tokens and over one; in training also the gradients, those of an idle expert included.

    Without gradients, the blocks of 70 tokens are computed one after the other.
    """
    model = tiny.CAUSAL_LM[method].from_base(tiny.tiny_base("llama"), tiny.tiny_config(method, num_experts=5))
    tiny.fill_adapter(model)
    block = model.train(training).base.model.layers[0].mlp
    for tokens in (70, 23, 1):
        x = torch.randn(1, tokens, block.router.shape[1], generator=torch.Generator().manual_seed(tokens))
        x[..., 0] = 9.0
        with torch.no_grad():
            block.router[:, 0] = torch.tensor([9.0, -9.0, 9.0, 9.0, 9.0])  # nobody chooses the second
        results = {}
        for name in ("by expert", "masked"):
            arranged(monkeypatch, name, 5)
            block.zero_grad()
            with torch.set_grad_enabled(training):
                out = block(x)
            if training:
                out.square().sum().backward()
                assert not block.experts["gate_proj"].lora_A.grad[1].any()
            results[name] = [out.detach(), *(p.grad.clone() for p in block.experts.parameters() if training)]
        for ours, exact in zip(results["masked"], results["by expert"], strict=True):
            assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_few_narrow_experts_share_one_product(monkeypatch):
    """Up to WIDE columns and more slots than experts; not where slots are left out."""
    block = bf16_model("mixlora", r=4).base.model.layers[0].mlp
    made = []
    monkeypatch.setattr(mixture, "SlotsMasked", type("Spy", (SlotsMasked,), {"__init__": spy(made)}))
    x = torch.randn(1, 9, 32).to(torch.bfloat16)
    block(x)
    assert len(made) == 1
    block(x[:, :2])  # 4 slots for 4 experts
    monkeypatch.setattr(mixture.SlotsMasked, "WIDE", 15)
    block(x)
    assert len(made) == 1
    block = bf16_model("mixlora", r=4, routing_strategy="top_p").base.model.layers[0].mlp
    block(x)
    assert len(made) == 1


def spy(made):
    def init(self, *arguments):
        made.append(arguments)
        SlotsMasked.__init__(self, *arguments)

    return init


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_equals_blocks(monkeypatch, method, dropout):
    """In fp32: values and gradients, of the input and the router too; an idle expert has zeros."""
    config = tiny.tiny_config(method, r=8, num_experts=5, lora_dropout=dropout)
    model = tiny.CAUSAL_LM[method].from_base(tiny.tiny_base("llama"), config)
    tiny.fill_adapter(model)
    block = model.train().base.model.layers[0].mlp
    given = torch.randn(1, 70, block.router.shape[1], generator=torch.Generator().manual_seed(70))
    given[..., 0] = 9.0
    with torch.no_grad():
        block.router[:, 0] = torch.tensor([9.0, -9.0, 9.0, 9.0, 9.0])  # nobody chooses the second
    results = {}
    for name in ("by expert", "training"):
        arranged(monkeypatch, name, 5)
        block.zero_grad()
        torch.manual_seed(0)  # the same values are dropped
        x = given.clone().requires_grad_()
        out = block(x)
        out.square().sum().backward()
        assert not block.experts["gate_proj"].lora_A.grad[1].any()
        results[name] = [out.detach(), x.grad, block.router.grad, *(p.grad.clone() for p in block.experts.parameters())]
    for ours, exact in zip(results["training"], results["by expert"], strict=True):
        assert exact.any()
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_when_training_has_its_own_arrangement(monkeypatch):
    """With gradients in float32 and more slots than experts, which are not narrow; not where slots are left out."""
    made = []

    class Spy(SlotsOfTraining):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(mixture, "SlotsOfTraining", Spy)
    block = bf16_model("mixlora", r=16).float().base.model.layers[0].mlp
    x = torch.randn(1, 9, 32)
    block(x)
    assert len(made) == 1
    with torch.no_grad():
        block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x)
    block(x[:, :2])  # 4 slots for 4 experts
    block.bfloat16()(x.bfloat16())
    bf16_model("mixlora", r=8).float().base.model.layers[0].mlp(x)  # 32 columns: one masked product
    bf16_model("mixlora", r=12).float().base.model.layers[0].mlp(x)  # rows of no whole 16 bytes
    bf16_model("mixlora", r=16, routing_strategy="top_p").float().base.model.layers[0].mlp(x)
    assert len(made) == 1


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
