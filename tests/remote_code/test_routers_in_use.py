"""Top-p and switch in training and loading: checkpointing, dropout, outputs, sparse layers, dtypes, compilation."""

import copy

import pytest
import torch
from reference import plain_mixture
from remote_code.test_training import enable_checkpointing
from tiny import (
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
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from minilora_hub import MixLoraForCausalLM

STRATEGIES = [pytest.param(TOP_P, id="top_p"), pytest.param(SWITCH, id="switch")]


# ---- checkpointing, dropout, jitter ----


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # inductor's own
@pytest.mark.parametrize("tokens", [1, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["mixlora", pytest.param("mixdora", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy", [pytest.param(TOP_P, id="top_p", marks=pytest.mark.slow), pytest.param(SWITCH, id="switch")]
)
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
