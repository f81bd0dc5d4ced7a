"""The routers top-p and switch: decisions, blocks, models and losses against the equations, one token at a time."""

import copy

import pytest
import torch
from reference import plain_balance, plain_mixture, plain_switch, plain_top_p
from tiny import FAMILIES, OTHER_FAMILIES, fill_adapter, logits, tiny_base, tiny_config, tiny_model, token_ids
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from minilora_hub import MixLoraForCausalLM
from minilora_hub.remote_code import mixture
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing import (
    load_balancing_loss,
    route_switch,
    route_top_p,
    router_z_loss,
    top_p_balancing_loss,
)

TOP_P = {"routing_strategy": "top_p"}
SWITCH = {"routing_strategy": "switch", "expert_capacity": 3, "router_jitter_noise": 0.0}
STRATEGIES = [pytest.param(TOP_P, id="top_p"), pytest.param(SWITCH, id="switch")]


def random_logits(*shape, scale=2.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MixtureOfLoraExperts)]


def padded(ids, side, amount):
    """(ids, mask) with `amount` padding tokens on one side."""
    padding = torch.zeros(ids.shape[0], amount, dtype=torch.long)
    parts = (padding, ids) if side == "left" else (ids, padding)
    masks = (padding, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), padding)
    return torch.cat(parts, dim=1), torch.cat(masks, dim=1)


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
@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("targets", ["all-linear", "no output", "only output"])
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
        monkeypatch.setattr(mixture, "_SlotsByExpert", mixture._SlotsGathered)
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
@pytest.mark.parametrize("family", [*FAMILIES, *OTHER_FAMILIES])
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
        outputs = model(ids[:, t : t + 1], past_key_values=outputs.past_key_values, use_cache=True)
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


# ---- checkpointing, dropout, jitter ----


def enable_checkpointing(model, arguments=None):
    new = getattr(model, "activation_checkpointing_enable", None)
    return (new or model.gradient_checkpointing_enable)(arguments)


def gradients_of(model, batches):
    """Two forwards before their backward, so that the second's padding must not serve the first's repetition."""
    model.zero_grad()
    losses = [model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss for ids, mask in batches]
    for loss in losses:
        loss.backward()
    return {name: p.grad.clone() for name, p in model.adapter_parameters().items()}


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradient_checkpointing_gives_the_same_gradients(strategy, method):
    batches = [padded(token_ids(2, 12), "left", 9), padded(token_ids(2, 12, seed=7), "right", 9)]
    plain = gradients_of(tiny_model("llama", method, **strategy).train(), batches)
    model = tiny_model("llama", method, **strategy).train()
    enable_checkpointing(model)
    for name, gradient in gradients_of(model, batches).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_that_would_lose_the_padding_is_refused():
    model = tiny_model("llama", "mixlora", router_aux_loss_coef=0, router_z_loss_coef=0, **SWITCH).train()
    enable_checkpointing(model.base)  # past the model, which would have sent the padding along
    ids, mask = padded(token_ids(2, 12), "left", 9)
    loss = model(ids, attention_mask=mask, labels=ids).loss
    with pytest.raises(ValueError, match=r"attention_mask: gradient checkpointing .*context_fn=.*checkpoint_contexts"):
        loss.backward()


@pytest.mark.parametrize("strategy", [pytest.param({}, id="top_k"), *STRATEGIES])
def test_expert_dropout_drops_what_the_block_puts_out_in_training_only(strategy):
    model = tiny_model("llama", "mixlora", expert_dropout=0.5, **strategy)
    module = mixtures(model)[0]
    x = torch.randn(2, 20, 32)
    assert torch.equal(module(x), module(x))
    module.train()
    torch.manual_seed(0)
    got = module(x)
    expected = torch.stack([plain_mixture(module, row) for row in x])
    dropped = got == 0
    assert 0.4 < dropped.float().mean() < 0.6
    torch.testing.assert_close(got, torch.where(dropped, 0.0, expected / 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_jitter_moves_the_router_only_and_in_training_only(strategy):
    model = tiny_model("llama", "mixlora", **strategy | {"router_jitter_noise": 0.3})
    module = mixtures(model)[0]
    x = torch.randn(1, 6, 32)
    seen = []
    module.base_block.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    assert all(torch.equal(rows, x[0]) for rows in seen)


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


# ---- outputs, layers, dtypes, compilation ----


@pytest.mark.parametrize(("strategy", "slots"), [(TOP_P, 4), (SWITCH, 1)], ids=["top_p", "switch"])
def test_routing_outputs_have_the_documented_shapes(strategy, slots):
    model, ids = tiny_model("llama", "mixlora", **strategy), token_ids()
    outputs = model(ids, output_router_logits=True, output_routing=True)
    assert (outputs.z_loss is None) == (strategy is TOP_P)
    for scores, selected, weights in zip(
        outputs.router_logits, outputs.selected_experts, outputs.routing_weights, strict=True
    ):
        assert scores.shape == (2, 9, 4)
        assert selected.shape == weights.shape == (2, 9, slots)
        assert ((weights == 0) == (selected == -1)).all()
        best = F.softmax(scores, dim=-1).max(dim=-1)
        assert torch.equal(selected[..., 0], best.indices)
        torch.testing.assert_close(weights[..., 0], best.values)
    assert torch.equal(model(ids).logits, outputs.logits)


@pytest.mark.parametrize(("layers", "step", "expected"), [(4, 1, [0, 1, 2, 3]), (5, 2, [1, 3]), (8, 3, [1, 4, 7])])
def test_sparse_step_leaves_plain_lora_on_the_other_layers(layers, step, expected, tmp_path):
    base = tiny_base(num_hidden_layers=layers)
    config = tiny_config("mixlora", router_sparse_step=step, expert_r=2, **SWITCH)
    model = MixLoraForCausalLM.from_base(copy.deepcopy(base), config)
    fill_adapter(model)
    names = model.adapter_parameters()
    assert [i for i in range(layers) if f"layers.{i}.mlp.router" in names] == expected
    for i in set(range(layers)) - set(expected):
        assert names[f"layers.{i}.mlp.up_proj.lora_A"].shape == (4, 32)
        assert f"layers.{i}.mlp.experts.up_proj.lora_A" not in names
    before = logits(model)
    assert len(model(token_ids(), output_routing=True).selected_experts) == len(expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(MixLoraForCausalLM.from_pretrained(tmp_path, base_model=base)), before)


def test_a_sparse_step_beyond_the_layers_is_refused():
    config = tiny_config("mixlora", router_sparse_step=2, **SWITCH)
    with pytest.raises(ValueError, match=r"router_sparse_step=2: layer 1 .* has 1"):
        MixLoraForCausalLM.from_base(tiny_base(num_hidden_layers=1), config)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_train_save_load_in_bf16(strategy, method, tmp_path):
    base = tiny_base("phi", biases=True)
    exact = MixLoraForCausalLM.from_base(copy.deepcopy(base), tiny_config(method, **strategy))
    fill_adapter(exact)
    model = MixLoraForCausalLM.from_base(copy.deepcopy(base).bfloat16(), tiny_config(method, **strategy))
    fill_adapter(model)
    ids = token_ids()
    near = (logits(model).float() - logits(exact)).abs().mean() / logits(exact).abs().mean()
    assert near < 0.05
    outputs = model.train()(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.adapter_parameters().values())
    model.eval().save_pretrained(tmp_path)
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path, base_model=copy.deepcopy(base).bfloat16())
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.routing_strategy == strategy["routing_strategy"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_trains_saves_and_loads_on_an_nf4_base(strategy, tmp_path):
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    tiny_base(hidden_size=64, intermediate_size=128, attention_bias=True, mlp_bias=True).save_pretrained(tmp_path / "b")
    quantised = {"quantization_config": BitsAndBytesConfig(**settings)}
    model = MixLoraForCausalLM.from_base(str(tmp_path / "b"), tiny_config("mixdora", **strategy), **quantised)
    fill_adapter(model)
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_ids(8, 10)]
    arguments = {"max_steps": 4, "learning_rate": 2e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no"}
    settings = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=0, **arguments)
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path / "out")
    loaded = MixLoraForCausalLM.from_pretrained(tmp_path / "out", **quantised)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("tokens", [1, 12])
@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_compiles_without_a_graph_break(strategy, method, tokens):
    model, ids = tiny_model("llama", method, **strategy), token_ids(2, tokens)
    expected = model(ids, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected.logits, rtol=0, atol=1e-4)
    if tokens > 1:
        ids, mask = padded(ids, "left", 9)
        expected = gradients_of(model.train(), [(ids, mask)])
        compiled.train()
        compiled(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
        for name, parameter in compiled.adapter_parameters().items():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
