"""Experts with a router on every linear, and layers with different numbers: the equations, and `moe_peft`'s MoLA."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from remote_code.moe_peft_code import load_model_file, needs_moe_peft
from remote_code.published_0_1_0.configuration_minilora import MixLoraConfig as EarlierConfig
from remote_code.test_training import enable_checkpointing
from tiny import SWITCH, TOP_P, fill_adapter, logits, mixtures, padded, tiny_base, tiny_config, tiny_model, token_ids
from tiny_architectures import tiny_architecture
from transformers import AutoModelForCausalLM

from minilora_hub import MixLoraConfig, MixLoraForCausalLM
from minilora_hub.remote_code.routed_linear import RoutedLinear
from minilora_hub.remote_code.routing import load_balancing_loss, router_losses, routing_of
from minilora_hub.remote_code.routing_record import record_routing

STRATEGIES = {
    "soft": {"num_experts": 3, "num_experts_per_tok": 3},
    "top-k": {"num_experts": 4, "num_experts_per_tok": 2},
    "hard": SWITCH,
    "arrow": {"routing_strategy": "arrow", "router_temperature": 0.5},
    "top-p": TOP_P,
    "different layers": {"num_experts": [2, 4]},
}


def routed(model) -> list[RoutedLinear]:
    return [module for module in model.modules() if isinstance(module, RoutedLinear)]


def linears_model(family="llama", **changes):
    return tiny_model(family, "mixlora", router_scope="linear", **changes)


def weights_of(strategy, config, scores):
    """The weight of each expert for one token, from the equations."""
    name = config.routing_strategy
    scores = scores.abs() / config.router_temperature if name == "arrow" else scores
    p = torch.softmax(scores, -1)
    order = p.argsort(descending=True).tolist()
    if name == "switch":
        kept = order[:1]
    elif name == "top_p":
        kept = [e for place, e in enumerate(order) if p[order[:place]].sum() <= config.router_top_p]
    else:
        kept = order[: config.num_experts_per_tok]
    total = 1.0 if name in ("switch", "top_p") else p[kept].sum()
    return {expert: p[expert] / total for expert in kept}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_linear_equals_the_sum_over_its_experts(strategy):
    """Token by token and expert by expert, with dense updates, in float64."""
    model = linears_model(**STRATEGIES[strategy])
    assert len(routed(model)) == 14
    seen = []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))) for m in routed(model)]
    logits(model)
    for handle in handles:
        handle.remove()
    for module, x, out in seen:
        a, b = module.update.lora_A.double(), module.update.lora_B.double()
        for row, got in zip(x.flatten(0, -2).double(), out.flatten(0, -2).double(), strict=True):
            expected = module.weight.double() @ row
            for expert, weight in weights_of(strategy, model.config, module.router.double() @ row).items():
                expected = expected + weight * module.update.scaling * (b[expert] @ a[expert]) @ row
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_experts_that_are_equal_are_one_lora():
    """Whatever a router whose weights sum to one decides, the base's output is kept."""
    model = linears_model(num_experts=3, num_experts_per_tok=2)
    with torch.no_grad():
        for module in routed(model):
            for leaf in (module.update.lora_A, module.update.lora_B):
                leaf.copy_(leaf[:1].expand_as(leaf))
    alone = tiny_base()
    with torch.no_grad():
        for site in model.sites:
            module = model.base.get_submodule(site.path)
            update = module.update.scaling * module.update.lora_B[0] @ module.update.lora_A[0]
            alone.get_submodule(site.path).weight += update
    assert (logits(model) - logits(alone)).abs().max() < 1e-4
    assert (logits(model) - logits(tiny_base())).abs().max() > 0.1


@pytest.mark.parametrize("family", ["phi", "gpt2", "gemma2"])
def test_families(family):
    """Biases, Conv1D; the update of a fresh adapter is zero, and the base comes back."""
    before = logits(tiny_base(family, biases=True))
    base = tiny_base(family, biases=True)
    model = MixLoraForCausalLM.from_base(base, tiny_config("mixlora", router_scope="linear"))
    assert torch.allclose(logits(model), before, atol=1e-5)
    fill_adapter(model)
    assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("targets", ["all-linear", ["fc1", "fc2"]], ids=["all", "flattened alone"])
@pytest.mark.parametrize("strategy", [{}, SWITCH], ids=["top-k", "switch"])
def test_a_base_without_a_known_block_that_flattens_its_tokens(strategy, targets):
    """OPT: the losses and the padding are those of (batch, seq) all the same."""
    base = AutoModelForCausalLM.from_config(tiny_architecture("opt").config).eval()
    config = tiny_config("mixlora", router_scope="linear", **strategy | {"target_modules": targets})
    model = MixLoraForCausalLM.from_base(base, config).train()
    fill_adapter(model)
    ids, mask = padded(token_ids(), "right", 3)
    outputs = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True)
    assert {layer.shape for layer in outputs.router_logits} == {(2, 12, 4)}
    k = 1 if strategy else 2
    torch.testing.assert_close(outputs.aux_loss, load_balancing_loss(outputs.router_logits, k, mask))
    outputs.loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.adapter_parameters().values())


def opt_model(targets):
    config = tiny_architecture("opt").config
    config.dropout = config.attention_dropout = config.layerdrop = 0.0
    base = AutoModelForCausalLM.from_config(config)
    config = tiny_config("mixlora", router_scope="linear", **SWITCH, target_modules=targets)
    model = MixLoraForCausalLM.from_base(base, config).train()
    fill_adapter(model)
    return model


@pytest.mark.parametrize("targets", ["all-linear", ["fc1", "fc2"]], ids=["all", "flattened alone"])
def test_flattened_tokens_have_their_shape_without_a_mask(targets):
    """The capacity of an expert is one of each sequence: a mask of ones changes nothing."""
    model, ids = opt_model(targets), token_ids()
    bare = model(ids, output_router_logits=True)
    masked = model(ids, attention_mask=torch.ones_like(ids), output_router_logits=True)
    assert {layer.shape for layer in bare.router_logits} == {(*ids.shape, 4)}
    assert torch.equal(bare.logits, masked.logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids))
    torch.testing.assert_close(embedded.logits, bare.logits)


@pytest.mark.parametrize("targets", ["all-linear", ["fc1", "fc2"]], ids=["all", "flattened alone"])
@pytest.mark.parametrize("has_mask", [True, False], ids=["mask", "no mask"])
def test_flattened_tokens_and_checkpointing(targets, has_mask):
    model, (ids, mask) = opt_model(targets), padded(token_ids(), "right", 3)
    arguments = {"input_ids": ids, "labels": ids, **({"attention_mask": mask} if has_mask else {})}
    model(**arguments).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.adapter_parameters().items()}
    model.zero_grad()
    enable_checkpointing(model, {"use_reentrant": False})
    model(**arguments).loss.backward()
    for name, parameter in model.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_flattened_tokens_of_no_known_shape_are_refused():
    """Rather than counted as one sequence. In evaluation, where nothing is dropped, the shape changes no logits."""
    model, ids = opt_model(["fc1", "fc2"]), token_ids()
    with pytest.raises(ValueError, match=r"layers.0: the base flattens its tokens here.*input_ids or inputs_embeds"):
        model.base(input_ids=ids)
    model.eval()
    assert torch.equal(model.base(input_ids=ids).logits, model(ids).logits)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_is_saved_and_loaded_to_the_same_bits(strategy, tmp_path):
    model = linears_model(**STRATEGIES[strategy])
    model.save_pretrained(tmp_path)
    again = MixLoraForCausalLM.from_pretrained(tmp_path, base_model=tiny_base())
    assert torch.equal(logits(again), logits(model))
    assert again.config.format_version == 4
    assert set(again.adapter_parameters()) == {
        f"{site.name}.{leaf}" for site in again.sites for leaf in ("router", "experts.lora_A", "experts.lora_B")
    }
    message = "routing_strategy='arrow'" if strategy == "arrow" else "format_version=4: this code reads"
    with pytest.raises(ValueError, match=message):
        EarlierConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_tensor_learns_also_with_checkpointing(strategy):
    model = linears_model(**STRATEGIES[strategy]).train()
    ids, mask = padded(token_ids(), "right", 3)
    arguments = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    model(**arguments).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.adapter_parameters().items()}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
    model.zero_grad()
    enable_checkpointing(model, {"use_reentrant": False})
    model(**arguments).loss.backward()
    for name, parameter in model.adapter_parameters().items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_token_over_the_capacity_keeps_the_bases_output():
    """Of equal tokens, an expert's linear serves the first of a sequence; padding takes no capacity."""
    module = routed(linears_model(**(SWITCH | {"expert_capacity": 2})))[0].train()
    x = torch.ones(1, 6, 32)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with record_routing(mask) as record:
        out = module(x)
    plain = module.base_layer(x)
    changed = (out - plain).abs().amax(-1)[0] > 1e-3
    assert changed[2:].tolist() == [True, True, False, False]
    assert record.selected[0][0, 2:, 0].ge(0).tolist() == [True, True, False, False]


@pytest.mark.parametrize("scope", [None, "linear"])
def test_layers_may_have_different_numbers_of_experts(scope, tmp_path):
    """The losses are means over the routers, those of each number apart; outputs have each layer's own."""
    model = tiny_model("llama", "mixlora", num_experts=[2, 5], router_scope=scope).train()
    outputs = model(token_ids(), output_router_logits=True, output_routing=True)
    experts = [layer.shape[-1] for layer in outputs.router_logits]
    per_layer = 1 if scope is None else 7
    assert experts == [2] * per_layer + [5] * per_layer
    halves = (outputs.router_logits[:per_layer], outputs.router_logits[per_layer:])
    expected = sum(load_balancing_loss(half, 2) for half in halves) / 2
    torch.testing.assert_close(outputs.aux_loss, expected)
    model.eval().save_pretrained(tmp_path)
    again = MixLoraForCausalLM.from_pretrained(tmp_path, base_model=tiny_base())
    assert (again.config.num_experts, again.config.format_version) == ([2, 5], 4)
    assert torch.equal(logits(again), logits(model))


def test_a_layer_of_its_own_number_equals_that_of_an_equal_mixture():
    """Layer by layer: the same tensors in a mixture whose layers are all of that size."""
    mixed = tiny_model("llama", "mixlora", num_experts=[2, 5])
    for index, experts in enumerate([2, 5]):
        equal = tiny_model("llama", "mixlora", num_experts=experts)
        equal_block, block = mixtures(equal)[index], mixtures(mixed)[index]
        equal_block.load_state_dict(block.state_dict())
        x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(index))
        with torch.no_grad():
            assert torch.equal(block(x), equal_block(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router_scope": "layer"}, r'router_scope=\'layer\': must be None or "linear"'),
        ({"router_scope": "linear", "expert_r": 4}, r"expert_r=4: router_scope=\"linear\" does not have it"),
        ({"router_scope": "linear", "use_dora": True}, r"use_dora=True: router_scope=\"linear\" does not have it"),
        ({"router_scope": "linear", "expert_dropout": 0.1}, r"expert_dropout=0\.1: router_scope"),
        ({"num_experts": []}, r"num_experts=\[\]: must be an integer of at least 1, or a list"),
        ({"num_experts": [2, 0]}, r"num_experts=\[2, 0\]: must be an integer"),
        ({"num_experts": [2, 1]}, r"num_experts_per_tok=2: .* from 1 to num_experts=\[2, 1\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**changes)


def test_a_list_must_fit_the_base():
    with pytest.raises(ValueError, match=r"num_experts=\[2, 2, 2\]: must be one number, or a list of 2"):
        tiny_model("llama", "mixlora", num_experts=[2, 2, 2])


@pytest.mark.parametrize("changes", [{"router_scope": "linear"}, {"num_experts": [2, 3]}])
def test_it_is_not_merged(changes):
    with pytest.raises(ValueError, match=r"cannot be merged: every token takes its own experts\.$"):
        tiny_model("llama", "mixlora", **changes).merge()


# ---- moe_peft's MoLA ----


@pytest.fixture
def mola(monkeypatch):
    return load_model_file(monkeypatch, "mola", ("Linear", "LoraConfig"))


def mola_of(mola, module, k):
    """Their block and the experts of one of our linears, and their configuration."""
    update, experts = module.update, module.router.shape[0]
    config = SimpleNamespace(
        adapter_name="a", num_experts_=experts, top_k_=k, router_init_range_=5.0, router_aux_loss_coef_=0.5
    )
    block = mola.MolaSparseMoe(module.in_features, torch.device("cpu"), config, module.router.detach())

    def expert(index):
        forward = lambda x: update.scaling * x @ update.lora_A[index].T @ update.lora_B[index].T  # noqa: E731
        return SimpleNamespace(lora_forward=forward)

    loras = {f"moe.a.experts.{index}": expert(index) for index in range(experts)}
    return block, SimpleNamespace(loras_=loras, out_features_=module.out_features), config


@needs_moe_peft
@pytest.mark.parametrize("num_experts", [3, [2, 4]])
def test_a_whole_model_equals_moe_pefts_mola(num_experts, mola):
    """Logits, gradients of the routers, and the balance loss of each number of experts."""
    model = linears_model(num_experts=num_experts).train()
    ids = token_ids()
    with record_routing() as record:
        ours = model.base(ids).logits
    names = [name for name in model.adapter_parameters() if name.endswith("router")]
    gradients = torch.autograd.grad(ours.square().mean(), [model.adapter_parameters()[name] for name in names])
    theirs, blocks, handles = tiny_base(), {}, []
    for site in model.sites:
        block, lora, config = mola_of(mola, model.base.get_submodule(site.path), 2)
        blocks[f"{site.name}.router"] = (block, config)

        def hook(_, args, out, block=block, lora=lora):
            return block(out, args[0], lora)

        handles.append(theirs.get_submodule(site.path).register_forward_hook(hook))
    expected = theirs(ids).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    assert (ours - logits(tiny_base())).abs().max() > 0.1
    plain = torch.autograd.grad(expected.square().mean(), [blocks[name][0].gate_.weight for name in names])
    for found, other in zip(gradients, plain, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)
    losses: dict[int, list] = {}
    for block, config in blocks.values():
        losses.setdefault(config.num_experts_, []).append((block.router_logits_, config))
    total = 0.0
    for found in losses.values():
        scores = torch.cat([one for one, _ in found])
        total = total + mola.MolaRouterLoss(found[0][1])(scores, None) * len(found) / len(blocks)
    balance = router_losses(record, routing_of(model.config), True)["aux_loss"]
    torch.testing.assert_close(0.5 * balance, total)
