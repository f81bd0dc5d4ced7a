"""The routers top-p and switch: decisions, blocks, models and losses against the equations, one token at a time."""

import pytest
import torch
from reference import plain_balance, plain_mixture, plain_switch, plain_top_p
from tiny import (
    CACHE,
    FAMILIES,
    OTHER_FAMILIES,
    SWITCH,
    TOP_P,
    fill_adapter,
    logits,
    mixtures,
    padded,
    tiny_base,
    tiny_config,
    tiny_model,
    token_ids,
)
from torch.nn import functional as F

from minilora_hub import MixLoraForCausalLM
from minilora_hub.remote_code import mixture
from minilora_hub.remote_code.routing import (
    load_balancing_loss,
    route_switch,
    route_top_p,
    router_z_loss,
    top_p_balancing_loss,
)

STRATEGIES = [pytest.param(TOP_P, id="top_p"), pytest.param(SWITCH, id="switch")]


def random_logits(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- the decisions ----


@pytest.mark.parametrize("experts", [1, 2, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.8, 1.0])
def test_top_p_takes_the_most_probable_until_they_exceed_it(top_p, temperature, experts):
    scores = random_logits(50, experts)
    weights, selected, kept = route_top_p(scores, top_p, temperature)
    for t, row in enumerate(scores):
        expected = plain_top_p(row, top_p, temperature)
        count = int(kept[t].sum())
        assert kept[t, :count].all(), "the kept slots come first"
        assert selected[t, :count].tolist() == [expert for _, expert in expected]
        torch.testing.assert_close(weights[t, :count], torch.stack([weight for weight, _ in expected]))
        assert not weights[t, count:].any()
        assert sorted(selected[t].tolist()) == list(range(experts)), "a slot that is not kept has a valid index too"


def test_the_temperature_is_the_references_and_not_that_of_a_softmax():
    """It divides the probabilities: the same as a threshold of top_p * T with weights divided by T."""
    scores = random_logits(200, 6, scale=1.0)
    weights, selected, kept = route_top_p(scores, 0.8, 0.5)
    other, other_selected, other_kept = route_top_p(scores, 0.8 * 0.5)
    assert torch.equal(selected, other_selected)
    assert torch.equal(kept, other_kept)
    torch.testing.assert_close(weights, other / 0.5)
    of_softmax, _, softmax_kept = route_top_p(scores / 0.5, 0.8)
    assert (kept != softmax_kept).any()
    assert (weights - of_softmax).abs().max() > 0.1


@pytest.mark.parametrize("capacity", [None, 1, 3, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_switch_serves_the_first_of_each_sequence(capacity, masked):
    scores = random_logits(3, 20, 4)
    mask = (random_logits(3, 20, seed=1) > 0).long() if masked else None
    probability, selected, kept = route_switch(scores, capacity, mask)
    refused = 0
    for row in range(3):
        for t, (weight, expert) in enumerate(plain_switch(scores[row], capacity, mask if mask is None else mask[row])):
            assert probability[row, t] == weight
            refused += expert is None
            assert (kept is None or bool(kept[row, t])) == (expert is not None)
            assert expert is None or selected[row, t] == expert
    assert (refused > 0) == (capacity in (1, 3))


# ---- one block ----


@pytest.mark.parametrize("gathered", [False, True], ids=["sorted", "gathered"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", pytest.param("phi3", marks=pytest.mark.slow), "phi"])
@pytest.mark.parametrize("targets", ["all-linear", "no output", pytest.param("only output", marks=pytest.mark.slow)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_block_equals_the_equations(strategy, targets, family, method, training, gathered, monkeypatch):
    """Forward and gradients, biases included: a token with weights that do not sum to one gets that much of a bias."""
    named = {"no output": {"llama": ["gate_proj", "up_proj"], "phi3": ["gate_up_proj"], "phi": ["fc1"]}}
    named["only output"] = {"llama": ["down_proj"], "phi3": ["down_proj"], "phi": ["fc2"]}
    chosen = "all-linear" if targets == "all-linear" else [f"mlp.{name}" for name in named[targets][family]]
    config = tiny_config(method, target_modules=chosen, **strategy)
    model = MixLoraForCausalLM.from_base(tiny_base(family, biases=True), config)
    fill_adapter(model)
    module = mixtures(model)[0].train(training)
    if gathered:
        monkeypatch.setattr(mixture, "SlotsByExpert", lambda selected, kept: mixture.SlotsGathered(selected))
    parameters = [*module.experts.parameters(), module.router]
    for tokens in (1, 20):
        x = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(3))
        got, expected = module(x), torch.stack([plain_mixture(module, row) for row in x])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)
        if method == "mixlora":  # the plain form would also differentiate DoRA's norm
            ours = torch.autograd.grad(got.square().sum(), parameters)
            plain = torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True)
            for a, b in zip(ours, plain, strict=True):
                torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_test_data_exercise_the_strategy(strategy):
    """Tokens with different numbers of experts, tokens over capacity: or the comparisons above would show little."""
    model = tiny_model("llama", "mixlora", **strategy).train()
    for selected in model(token_ids(2, 20), output_routing=True).selected_experts:
        counts = (selected >= 0).sum(dim=-1)
        assert len(counts.unique()) > 1


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in OTHER_FAMILIES)]
)
def test_logits_equal_the_equations(family, strategy):
    model = tiny_model(family, "mixlora", **strategy)
    got = logits(model)
    one = logits(model, token_ids(1, 1))
    top_k = tiny_model(family, "mixlora")
    assert (got - logits(top_k)).abs().max() > 1e-2
    for module in mixtures(model):
        module.forward = lambda x, module=module: torch.stack([plain_mixture(module, row) for row in x])
    torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-4)
    torch.testing.assert_close(one, logits(model, token_ids(1, 1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_expert_without_tokens_gets_a_gradient_of_zeros(strategy):
    model = tiny_model("llama", "mixlora", num_experts=12, **strategy).train()
    ids = token_ids(1, 3)
    outputs = model(ids, labels=ids, output_routing=True)
    outputs.loss.backward()
    served = set(outputs.selected_experts[0].flatten().tolist())
    gradient = model.adapter_parameters()["layers.0.mlp.experts.up_proj.lora_B"].grad
    for expert in range(12):
        assert bool(gradient[expert].any()) == (expert in served)
    assert not set(range(12)) <= served


# ---- capacity, padding, batches ----


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_padded_batch_equals_single_rows_at_inference(strategy, side):
    model = tiny_model("llama", "mixlora", **strategy)
    ids = token_ids(3, 12)
    short, mask = padded(ids[:1, :7], side, 5)
    mask = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)))
    together = logits(model, torch.cat((short, ids[1:])), attention_mask=mask)
    real = together[:1, 5:] if side == "left" else together[:1, :7]
    torch.testing.assert_close(real, logits(model, ids[:1, :7]), rtol=0, atol=1e-4)
    torch.testing.assert_close(together[1:2], logits(model, ids[1:2]), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_token_by_token_with_a_cache_equals_one_call(strategy):
    """A capacity at inference would break this: with a cache each call sees one token, and nobody is over it."""
    model = tiny_model("llama", "mixlora", **strategy)
    ids = token_ids(2, 12)
    outputs = model(ids[:, :5], use_cache=True)
    steps = [outputs.logits]
    for t in range(5, 12):
        outputs = model(ids[:, t : t + 1], use_cache=True, **{CACHE: outputs[CACHE]})
        steps.append(outputs.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), logits(model, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_capacity_in_training(side):
    model = tiny_model("llama", "mixlora", **SWITCH).train()
    ids = token_ids(2, 12)
    wide, mask = padded(ids, side, 9)
    alone = model(ids, output_routing=True)
    together = model(wide, attention_mask=mask, output_routing=True)
    blind = model(wide, output_routing=True)
    differs = False
    for one, other, unmasked in zip(
        alone.selected_experts, together.selected_experts, blind.selected_experts, strict=True
    ):
        where = slice(9, None) if side == "left" else slice(0, 12)
        assert (one == -1).any()
        assert torch.equal(one, other[:, where])
        differs |= not torch.equal(one, unmasked[:, where])
    assert differs == (side == "left")  # padding behind takes nothing that was wanted before


def test_slots_that_are_not_kept_cost_nothing():
    module = mixtures(tiny_model("llama", "mixlora", **TOP_P))[0]
    rows, x = [], torch.randn(1, 30, 32)
    module.structure.activation.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    module(x)
    assert rows == [int(module.route(x[0], (1, 30)).kept.sum())]
    assert 30 < rows[0] < 30 * 4


def test_a_token_over_capacity_passes_with_its_probability():
    model = tiny_model("llama", "mixlora", **SWITCH)
    module = mixtures(model)[0].train()
    x = torch.randn(1, 1, 32).expand(1, 5, 32)  # five times the same token: three are served
    out = module(x)[0]
    probability = F.softmax(module.router @ x[0, 0], dim=-1).max()
    torch.testing.assert_close(out[3:], probability * x[0, 3:])
    torch.testing.assert_close(out[:3], plain_mixture(module.eval(), x[0, :3]), rtol=1e-4, atol=1e-5)


# ---- the losses ----


def plain_tokens(layers, mask, choose):
    """(probabilities, chosen experts) of every token of every layer that is no padding."""
    return [
        (F.softmax(layer[b, t], dim=-1), choose(layer[b, t]))
        for layer in layers
        for b in range(layer.shape[0])
        for t in range(layer.shape[1])
        if mask is None or mask[b, t]
    ]


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_the_formulas(masked):
    layers = [random_logits(3, 7, 5, seed=layer) for layer in range(4)]
    mask = None
    if masked:
        mask = torch.ones(3, 7, dtype=torch.long)
        mask[0, :3] = mask[2, :6] = 0
    for temperature in (0.0, 0.7):
        chosen = plain_tokens(layers, mask, lambda row, t=temperature: [e for _, e in plain_top_p(row, 0.8, t)])
        ours = top_p_balancing_loss(layers, 0.8, temperature, mask)
        torch.testing.assert_close(ours, plain_balance(chosen, 5))
    one = plain_tokens(layers, mask, lambda row: [int(row.argmax())])
    torch.testing.assert_close(load_balancing_loss(layers, 1, mask), plain_balance(one, 5))
    squares = [
        row.exp().sum().log() ** 2
        for layer in layers
        for row in (layer.flatten(0, 1) if mask is None else layer[mask.bool()])
    ]
    torch.testing.assert_close(router_z_loss(layers, mask), torch.stack(squares).mean())


def test_padding_counts_in_the_references_losses_and_not_in_ours():
    """What `moe_peft` computes over all tokens, written out, is ours without a mask, and another number with one."""
    model = tiny_model("llama", "mixlora", **TOP_P)
    ids, mask = padded(token_ids(2, 8), "right", 6)
    outputs = model(ids, attention_mask=mask, output_router_logits=True)
    alone = model(ids[:, :8], output_router_logits=True)
    torch.testing.assert_close(outputs.aux_loss, alone.aux_loss, rtol=1e-4, atol=1e-4)
    every = plain_tokens(outputs.router_logits, None, lambda row: [e for _, e in plain_top_p(row, 0.8)])
    theirs = plain_balance(every, 4)
    torch.testing.assert_close(top_p_balancing_loss(outputs.router_logits, 0.8), theirs)
    assert (theirs - outputs.aux_loss).abs() > 1e-2


def test_switch_adds_both_losses_in_training():
    model = tiny_model("llama", "mixlora", router_aux_loss_coef=0.5, router_z_loss_coef=0.25, **SWITCH).train()
    ids, mask = padded(token_ids(2, 12), "left", 3)
    labels = ids.masked_fill(mask == 0, -100)
    trained = model(ids, attention_mask=mask, labels=labels, output_router_logits=True)
    language = model(ids, attention_mask=mask).logits
    language = F.cross_entropy(language[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(trained.loss, language + 0.5 * trained.aux_loss + 0.25 * trained.z_loss)
    torch.testing.assert_close(trained.z_loss, router_z_loss(trained.router_logits, mask))
    torch.testing.assert_close(trained.aux_loss, load_balancing_loss(trained.router_logits, 1, mask))
    model.eval()
    assert model(ids, attention_mask=mask, labels=labels).z_loss is None


@pytest.mark.parametrize(("aux", "z"), [(0.5, 0), (0, 0.5), (0, 0)])
def test_each_loss_can_be_off(aux, z):
    model = tiny_model("llama", "mixlora", router_aux_loss_coef=aux, router_z_loss_coef=z, **SWITCH).train()
    ids = token_ids()
    bare = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    outputs = model(ids, labels=ids, output_router_logits=True)
    torch.testing.assert_close(outputs.loss, bare + aux * outputs.aux_loss + z * outputs.z_loss)
