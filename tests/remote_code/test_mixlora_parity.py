"""MixLoRA against the reference package `mixlora`, against a plain reading of the equations, and its balance loss."""

import copy

import pytest
import torch
from reference import plain_mixture, reference_mixlora
from tiny import fill_adapter, logits, tiny_base, tiny_config, tiny_model, token_ids
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minilora_hub import MixLoraForCausalLM
from minilora_hub.remote_code import mixture
from minilora_hub.remote_code.expert_slots import SlotsMasked
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routing import load_balancing_loss, route_top_k

REFERENCE_FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "phi", "phi3")


@pytest.mark.parametrize("family", REFERENCE_FAMILIES)
@pytest.mark.parametrize("experts_per_tok", [1, 2, 3])
def test_logits_equal_the_reference_packages(family, experts_per_tok, tmp_path):
    base = tiny_base(family)
    config = tiny_config("mixlora", num_experts_per_tok=experts_per_tok)
    model = MixLoraForCausalLM.from_base(copy.deepcopy(base), config)
    fill_adapter(model)
    twin = reference_mixlora(copy.deepcopy(base), model, tmp_path)
    assert (logits(model) - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), logits(twin), rtol=0, atol=1e-4)
    one = token_ids(1, 1)  # few slots take the gathered path
    torch.testing.assert_close(logits(model, one), logits(twin, one), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", "phi3", "phi"])
@pytest.mark.parametrize("targets", ["all-linear", "no output", "only output"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_block_equals_the_equations(method, family, targets, tokens):
    """Forward and gradients of both slot layouts, biases included, with experts on some or all projections."""
    model = MixLoraForCausalLM.from_base(tiny_base(family, biases=True), tiny_config(method))
    site = next(site for site in model.sites if hasattr(site, "structure"))
    inputs, output = list(site.structure.inputs), site.structure.output
    if targets != "all-linear":
        chosen = inputs if targets == "no output" else [output]
        model = MixLoraForCausalLM.from_base(
            tiny_base(family, biases=True), tiny_config(method, target_modules=[f"mlp.{name}" for name in chosen])
        )
    fill_adapter(model)
    module = next(m for m in model.modules() if isinstance(m, MixtureOfLoraExperts))
    x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(3))
    got, expected = module(x)[0], plain_mixture(module, x[0])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if method == "mixlora":  # the plain form would also differentiate DoRA's norm
        parameters = [*module.experts.parameters(), module.router]
        ours = torch.autograd.grad(module(x)[0].square().sum(), parameters)
        plain = torch.autograd.grad(plain_mixture(module, x[0]).square().sum(), parameters)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("narrow", [True, False])
def test_dropout_equals_the_equations_with_the_same_masks(monkeypatch, narrow):
    monkeypatch.setattr(SlotsMasked, "WIDE", 1000 if narrow else 0)
    model = MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", lora_dropout=0.3))
    fill_adapter(model)
    module = next(m for m in model.modules() if isinstance(m, MixtureOfLoraExperts)).train()
    inputs, outputs, masks = {}, {}, {}
    for name, update in module.experts.items():

        def keep(_, args, output, name=name):
            inputs[name], outputs[name] = args[0], output

        update.dropout.register_forward_hook(keep)
    x = torch.randn(1, 30, 32)
    got = module(x)[0]
    _, selected = route_top_k(F.linear(x[0], module.router), 2)
    # Few and narrow experts keep the slots in token order; see the arrangements in expert_slots.py.
    order = range(selected.numel()) if narrow else selected.flatten().argsort(stable=True)
    for name, before in inputs.items():
        mask = torch.where(before == 0, 1.0, outputs[name] / before)
        assert {round(value, 4) for value in mask.unique().tolist()} == {0.0, round(1 / 0.7, 4)}
        masks[name] = {(int(slot) // 2, int(slot) % 2): mask[row] for row, slot in enumerate(order)}
    torch.testing.assert_close(got, plain_mixture(module, x[0], masks), rtol=1e-4, atol=1e-5)


def test_both_slot_layouts_agree(monkeypatch):
    model = tiny_model("llama", "mixlora")
    sorted_ = logits(model)
    monkeypatch.setattr(mixture, "SlotsByExpert", lambda selected, kept: mixture.SlotsGathered(selected))
    torch.testing.assert_close(logits(model), sorted_, rtol=0, atol=1e-5)


def test_every_base_matrix_runs_once_per_token():
    """However many experts serve a token, the shared projections see each token once."""
    model = tiny_model("llama", "mixlora", num_experts_per_tok=3)
    rows = {}
    for name, module in model.named_modules():
        if name.endswith(("gate_proj", "up_proj", "down_proj")) and isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda _, args, __, name=name: rows.setdefault(name, []).append(args[0].numel())
            )
    logits(model)
    assert len(rows) == 6
    assert all(seen == [18 * (48 if name.endswith("down_proj") else 32)] for name, seen in rows.items())


# ---- the balance loss ----


def test_balance_loss_equals_mixtrals():
    layers = [torch.randn(3, 7, 5) for _ in range(4)]
    mask = torch.ones(3, 7)
    mask[0, :3] = mask[2, :6] = 0
    for attention_mask in (None, mask):
        ours = load_balancing_loss(layers, 2, attention_mask)
        theirs = load_balancing_loss_func(tuple(x.flatten(0, 1) for x in layers), 5, 2, attention_mask)
        torch.testing.assert_close(ours, theirs)


def test_balance_loss_is_added_in_training_only_and_reported_apart():
    model, ids = tiny_model("llama", "mixlora", router_aux_loss_coef=0.5), token_ids()
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    reported = model(ids, labels=ids, output_router_logits=True)
    assert torch.equal(reported.loss, plain.loss)
    model.train()
    trained = model(ids, labels=ids)
    torch.testing.assert_close(trained.loss, plain.loss + 0.5 * reported.aux_loss)
    trained.loss.backward()
    router = model.adapter_parameters()["layers.0.mlp.router"]
    with_balance = router.grad.clone()
    model.zero_grad()
    model.eval()
    model(ids, labels=ids).loss.backward()
    assert not torch.allclose(with_balance, router.grad)


def test_balance_loss_is_averaged_over_accumulated_micro_batches():
    model, ids = tiny_model("llama", "mixlora", router_aux_loss_coef=0.5).train(), token_ids(4, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    count = (labels[:, 1:] != -100).sum()
    parts = [model(ids[rows], labels=labels[rows], num_items_in_batch=count) for rows in (slice(0, 2), slice(2, 4))]
    model.eval()
    language = model(ids, labels=labels).loss
    shares = [(labels[rows, 1:] != -100).sum() / count for rows in (slice(0, 2), slice(2, 4))]
    balance = sum(share * part.aux_loss for share, part in zip(shares, parts, strict=True))
    torch.testing.assert_close(sum(part.loss for part in parts), language + 0.5 * balance)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_balance_loss(side):
    model, ids = tiny_model("llama", "mixlora"), token_ids(1, 6)
    padding = torch.zeros(1, 4, dtype=torch.long)
    both = (padding, ids) if side == "left" else (ids, padding)
    padded = torch.cat(both, dim=1)
    mask = (padded != 0).long()
    alone = model(ids, output_router_logits=True).aux_loss
    together = model(padded, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    unmasked = model(padded, output_router_logits=True).aux_loss
    assert (unmasked - alone).abs() > 1e-3


def test_routing_is_returned_when_asked_and_costs_nothing_otherwise():
    model, ids = tiny_model("llama", "mixlora"), token_ids()
    outputs = model(ids, output_router_logits=True, output_routing=True)
    assert len(outputs.router_logits) == len(outputs.selected_experts) == len(outputs.routing_weights) == 2
    for router_logits, selected, weights in zip(
        outputs.router_logits, outputs.selected_experts, outputs.routing_weights, strict=True
    ):
        assert router_logits.shape == (2, 9, 4)
        expected, indices = F.softmax(router_logits, dim=-1).topk(2)
        assert torch.equal(selected, indices)
        torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True))
    plain = model(ids)
    assert plain.router_logits is None
    assert plain.selected_experts is None
    assert torch.equal(plain.logits, outputs.logits)
    as_tuple = model(ids, return_dict=False)
    assert torch.equal(as_tuple[0], plain.logits)


def test_routing_is_recorded_per_thread():
    """Two forwards at once, one of which records: neither sees the other's tokens."""
    import threading

    model = tiny_model("llama", "mixlora")
    barrier, results = threading.Barrier(2), {}

    def run(name, ids, record):
        barrier.wait()
        results[name] = [model(ids, output_routing=record) for _ in range(5)]

    threads = [
        threading.Thread(target=run, args=("recorded", token_ids(1, 5), True)),
        threading.Thread(target=run, args=("other", token_ids(1, 8), False)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs in results["recorded"]:
        assert [selected.shape for selected in outputs.selected_experts] == [(1, 5, 2)] * 2
    assert all(outputs.selected_experts is None for outputs in results["other"])


def test_jitter_and_dropout_are_off_in_eval_and_on_in_training():
    model = tiny_model("llama", "mixlora", lora_dropout=0.5, router_jitter_noise=0.3)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    first = model(token_ids(), output_router_logits=True).router_logits[0]
    assert not torch.equal(first, model(token_ids(), output_router_logits=True).router_logits[0])
    model.eval()
    assert torch.equal(logits(model), logits(model))
