"""Top-p and switch against the reference's own training code, run live: see `moe_peft_code`."""

from types import SimpleNamespace

import pytest
import torch
from reference import plain_expert
from remote_code.moe_peft_code import load_model_file, needs_moe_peft
from tiny import fill_adapter, tiny_base, tiny_config

from minilora_hub import MixLoraForCausalLM
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing import router_loss_weights, routing_of

pytestmark = needs_moe_peft

SWITCH = {"routing_strategy": "switch", "expert_capacity": 3, "router_jitter_noise": 0.0}
STRATEGIES = [
    pytest.param({"routing_strategy": "top_p"}, id="top_p"),
    pytest.param({"routing_strategy": "top_p", "router_top_p": 0.5, "router_temperature": 0.5}, id="temperature 0.5"),
    pytest.param({"routing_strategy": "top_p", "router_temperature": 2.0}, id="temperature 2"),
    pytest.param(SWITCH, id="switch"),
]


@pytest.fixture
def routers(monkeypatch):
    return load_model_file(monkeypatch, "mixlora", ("LLMFeedForward", "LLMModelInput", "LoraConfig"))


class PlainExperts:
    """The feed-forward block as the reference's routers see it: expert by number, one token at a time."""

    def __init__(self, module):
        self.module = module

    def _lora_forward(self, name, _, data):
        expert = int(name.rpartition(".")[2])
        return torch.stack([plain_expert(self.module, expert, row) for row in data]) if len(data) else data


def both(routers, family, method, strategy):
    """(our block in training, the reference's router, its arguments, its loss) with the same weights."""
    model = MixLoraForCausalLM.from_base(tiny_base(family, biases=True), tiny_config(method, **strategy))
    fill_adapter(model)
    module, config = next(m for m in model.modules() if isinstance(m, MixtureOfLoraExperts)).train(), model.config
    theirs = SimpleNamespace(
        adapter_name="default",
        num_experts_=config.num_experts,
        act_fn_=None,
        router_init_range_=0.02,
        jitter_noise_=0.0,
        top_p_=config.router_top_p,
        temperature_=config.router_temperature,
        expert_capacity_=config.expert_capacity,
        ffn_dropout_=0.0,
        router_aux_loss_coef_=config.router_aux_loss_coef,
        router_z_loss_coef_=config.router_z_loss_coef,
    )
    kind = "Switch" if strategy is SWITCH else "Dynamic"
    router = getattr(routers, f"{kind}SparseMoe")(32, torch.device("cpu"), theirs)
    with torch.no_grad():
        router.gate_.weight.copy_(module.router)
    loss = getattr(routers, f"{kind}RouterLoss")(theirs)
    return module, router, loss, config


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", pytest.param("phi3", marks=pytest.mark.slow), "phi"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_training_equals_moe_pefts(strategy, family, method, routers):
    module, router, loss, config = both(routers, family, method, strategy)
    arguments = SimpleNamespace(inference_mode_=False, efficient_operator_=False)
    x = torch.randn(3, 15, 32, generator=torch.Generator().manual_seed(3))
    expected, scores = router(x.clone(), PlainExperts(module), arguments)
    got = module(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(got.square().sum(), module.router)
    (plain,) = torch.autograd.grad(expected.square().sum(), router.gate_.weight)
    torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)
    losses = routing_of(config).losses([scores.view(3, 15, -1)])
    total = sum(weight * losses[name] for name, weight in router_loss_weights(config).items())
    torch.testing.assert_close(total, loss(scores, None))


def test_moe_pefts_switch_uses_no_expert_at_inference_and_ours_does(routers):
    module, router, _, _ = both(routers, "llama", "mixlora", SWITCH)
    arguments = SimpleNamespace(inference_mode_=True, efficient_operator_=False)
    x = torch.randn(1, 15, 32)
    theirs, _ = router(x.clone(), PlainExperts(module), arguments)
    assert torch.equal(theirs, x)
    module.eval()
    assert (module(x) - x).abs().max() > 1e-2
