"""Training: transformers' Trainer, gradient checkpointing, mixed precision, and quantised bases."""

import copy
import warnings

import pytest
import torch
from tiny import CAUSAL_LM, METHODS, fill_adapter, logits, tiny_base, tiny_config, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from minilora_hub.remote_code.adapted_linear import add_low_rank, add_low_rank_
from minilora_hub.remote_code.linear_layers import row_norms_squared


def train(model, folder, steps=12, **arguments):
    rows = [{"input_ids": row, "labels": row, "attention_mask": torch.ones_like(row)} for row in token_ids(8, 10)]
    arguments = {"learning_rate": 2e-2, "per_device_train_batch_size": 4, "logging_steps": 1} | arguments
    settings = TrainingArguments(
        output_dir=str(folder), max_steps=steps, report_to=[], use_cpu=True, save_strategy="no", seed=0, **arguments
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trainer


@pytest.mark.parametrize("method", METHODS)
def test_trainer_trains_the_adapter_and_nothing_else(method, tmp_path):
    base = tiny_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = CAUSAL_LM[method].from_base(base, tiny_config(method))
    losses, trainer = train(model, tmp_path, gradient_accumulation_steps=2)
    assert losses[-1] < losses[0] - 0.5
    trainer.save_model(tmp_path / "saved")  # hands the state dict to save_pretrained
    model.eval()
    loaded = CAUSAL_LM[method].from_pretrained(tmp_path / "saved", base_model=tiny_base())
    assert torch.equal(logits(loaded), logits(model))
    after = model.unload().state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def enable_checkpointing(model, arguments=None):
    """Under its name in transformers 5.23, or under the older one, which 5.23 warns about."""
    new = getattr(model, "activation_checkpointing_enable", None)
    return (new or model.gradient_checkpointing_enable)(arguments)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_gives_the_same_gradients(method):
    ids = token_ids()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model("llama", method).train()
        if checkpointing:
            enable_checkpointing(model)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.adapter_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_reentrant_checkpointing_would_lose_the_balance_loss_and_is_refused():
    model, ids = tiny_model("llama", "mixlora").train(), token_ids()
    enable_checkpointing(model, {"use_reentrant": True})
    with pytest.raises(ValueError, match=r'"use_reentrant": False'):
        model(ids, labels=ids)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo's own
def test_compiled_checkpointing_would_lose_the_balance_loss_and_is_refused():
    model, ids = tiny_model("llama", "mixlora").train(), token_ids()
    model.base.config.use_cache = False
    enable_checkpointing(model)
    torch._dynamo.reset()
    with pytest.raises(ValueError, match=r"torch\.compile and gradient checkpointing together"):
        torch.compile(model, backend="eager")(ids, labels=ids)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
def test_autocast_trains_close_to_fp32(method):
    model, ids = tiny_model("llama", method), token_ids()
    exact = model(ids, labels=ids).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(ids, labels=ids).loss
    torch.testing.assert_close(mixed, exact, rtol=3e-2, atol=3e-2)
    mixed.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.adapter_parameters().values())


@pytest.mark.parametrize("method", METHODS)
def test_fp32_adapter_on_a_bf16_base_trains(method):
    model = CAUSAL_LM[method].from_base(tiny_base().to(torch.bfloat16), tiny_config(method))
    assert {p.dtype for p in model.adapter_parameters().values()} == {torch.float32}
    ids = token_ids()
    outputs = model.train()(ids, labels=ids)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16
    assert all(torch.isfinite(p.grad).all() for p in model.adapter_parameters().values())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("experts", [3, 20])  # in one product for all, and a product for each
def test_fp32_experts_on_a_bf16_base_compute_as_if_rounded_to_bf16(training, experts):
    """Elementwise the same as with bf16 experts: fp32 is what learns, not what is multiplied."""
    base = tiny_base().to(torch.bfloat16)
    model = CAUSAL_LM["mixlora"].from_base(base, tiny_config("mixlora", num_experts=experts)).train(training)
    fill_adapter(model)
    rounded = copy.deepcopy(model)
    for name, parameter in rounded.adapter_parameters().items():
        if not name.endswith("router"):  # which computes in fp32
            parameter.data = parameter.data.to(torch.bfloat16)
    ids, results = token_ids(), []
    for each in (model, rounded):
        with torch.set_grad_enabled(training):
            results.append(each(ids, labels=ids))
    assert torch.equal(results[0].logits, results[1].logits)
    if training:
        for result in results:
            result.loss.backward()
        for name, parameter in model.adapter_parameters().items():
            assert parameter.grad.dtype == torch.float32
            expected = rounded.adapter_parameters()[name].grad.float()
            assert (parameter.grad - expected).abs().max() <= 0.02 * expected.abs().max(), name


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_of_the_low_rank_products(out_dtype):
    """bf16 where the base computes in it; in fp16, whose range is small, and in fp32 the adapter's own."""
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in ((5, 16), (4, 16), (24, 4)))
    x, out = x.to(out_dtype), torch.zeros(5, 24, dtype=out_dtype)
    used = torch.bfloat16 if out_dtype == torch.bfloat16 else torch.float32
    expected = ((x.to(used) @ a.to(used).mT) @ b.to(used).mT * 0.5).to(out_dtype)
    torch.testing.assert_close(add_low_rank(out, x, a, b, 0.5), expected)
    changed = out.clone()
    add_low_rank_(changed, x, a, b, 0.5)
    torch.testing.assert_close(changed, expected)


# ---- quantised bases (bitsandbytes runs on the CPU) ----

NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)


INT8 = BitsAndBytesConfig(load_in_8bit=True)


@pytest.fixture(scope="module")
def wide_base_folder(tmp_path_factory):
    """A base whose rows are long enough for NF4's blocks of 64."""
    folder = tmp_path_factory.mktemp("wide")
    tiny_base(hidden_size=64, intermediate_size=128, pad_token_id=0).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("quantisation", "kind"), [(NF4, "Linear4bit"), (INT8, "Linear8bitLt")], ids=["nf4", "int8"])
def test_quantised_base_loads_generates_and_trains(method, quantisation, kind, wide_base_folder, tmp_path):
    arguments = {"quantization_config": quantisation}
    model = CAUSAL_LM[method].from_base(str(wide_base_folder), tiny_config(method), **arguments)
    assert sum(type(module).__name__ == kind for module in model.modules()) == 14
    assert getattr(model, "is_loaded_in_4bit" if kind == "Linear4bit" else "is_loaded_in_8bit")
    base = AutoModelForCausalLM.from_pretrained(wide_base_folder, **arguments)
    for module in base.modules():
        if kind == type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    # int8 rounds each row it multiplies, and MixDoRA's output projection sees other rows than the base's.
    tolerance = 0.3 if (method, kind) == ("mixdora", "Linear8bitLt") else 1e-5
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=tolerance)
    losses, _ = train(model, tmp_path / "t", steps=3)
    assert losses[-1] < losses[0]
    model.eval()
    before = logits(model)
    model.save_pretrained(tmp_path / "out")
    loaded = CAUSAL_LM[method].from_pretrained(tmp_path / "out", **arguments)
    assert torch.equal(logits(loaded), before)
    assert loaded.generate(token_ids(), max_new_tokens=3, do_sample=False).shape == (2, 12)
    if method == "dora":
        with pytest.raises(ValueError, match=f"cannot merge into a {kind}"):
            loaded.merge()
        assert torch.equal(logits(loaded), before)


def test_dora_norm_of_a_quantised_weight_is_that_of_its_dequantised_values(wide_base_folder):
    import bitsandbytes as bnb

    model = CAUSAL_LM["dora"].from_base(str(wide_base_folder), tiny_config("dora"), quantization_config=NF4)
    layer = model.base.model.layers[0].mlp.up_proj.base_layer
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    logits(model)  # on some CPUs this would repack the weight, rounded, for bitsandbytes' inference kernel
    torch.testing.assert_close(row_norms_squared(layer, chunk=24), weight.float().square().sum(dim=1))


@pytest.mark.parametrize("method", METHODS)
def test_a_4bit_base_that_was_evaluated_still_trains_with_the_right_gradients(method, wide_base_folder):
    """On a CPU bitsandbytes repacks a 4-bit weight in eval mode for a kernel without a backward, and leaves it so."""
    ids, gradients = token_ids(), []
    for evaluate in (False, True):
        model = CAUSAL_LM[method].from_base(str(wide_base_folder), tiny_config(method), quantization_config=NF4)
        fill_adapter(model)
        if evaluate:
            logits(model.eval())
        model.train()(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.adapter_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


# ---- writing to the base's product ----


@pytest.mark.parametrize("listen", ["hook", "everybody's hook", "forward"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_on_a_base_layer_keep_its_output(method, dropout, listen, monkeypatch):
    """In training the low-rank part is written into the base's product, unless somebody listens: same gradients."""
    model = CAUSAL_LM[method].from_base(tiny_base(), tiny_config(method, lora_dropout=dropout)).train()
    fill_adapter(model)
    ids, kept = token_ids(), []
    layer = model.base_model.layers[0].self_attn.q_proj.base_layer

    def keep(module, args, out):
        if module is layer and args[0].dim() == 3:  # DoRA's norm calls it, too, with the rows of A
            kept.append((args[0], out))

    def forward(x, plain=layer.forward):
        kept.append((x, plain(x)))
        return kept[-1][1]

    def gradients():
        torch.manual_seed(3)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.adapter_parameters().items()}

    unheard = gradients()
    if listen == "forward":
        monkeypatch.setattr(layer, "forward", forward)
        heard = gradients()
    else:
        everybody = nn.modules.module.register_module_forward_hook
        with everybody(keep) if listen.startswith("everybody") else layer.register_forward_hook(keep):
            heard = gradients()
    x, out = kept[0]
    assert x.dim() == 3
    torch.testing.assert_close(out, nn.functional.linear(x, layer.weight, layer.bias))
    for name, gradient in unheard.items():
        torch.testing.assert_close(heard[name], gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dora", "lora"])
def test_training_keeps_no_more_of_a_layer_than_its_gradient_needs(method):
    """Plain LoRA keeps x and A x; DoRA what its scale multiplies, too. The base's own product is not kept beside it."""
    from minilora_hub.remote_code.adapted_linear import AdaptedLinear, LowRankUpdate

    layer, rows, r = nn.Linear(32, 48).requires_grad_(False), 7, 4
    dora = method == "dora"
    update = LowRankUpdate(
        torch.randn(r, 32),
        torch.randn(48, r),
        torch.ones(48) if dora else None,
        2.0,
        0.0,
        row_norms_squared(layer) if dora else None,
    )
    adapted, kept = AdaptedLinear(layer, update).train(), []
    weights = {tensor.data_ptr() for tensor in (*layer.parameters(), *update.parameters())}

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapted(torch.randn(1, rows, 32, requires_grad=True))
    large = {
        t.untyped_storage().data_ptr(): t.numel() for t in kept if t.data_ptr() not in weights and t.numel() > 48 * r
    }
    assert sorted(large.values()) == ([32 * rows, 48 * rows] if dora else [32 * rows])


# ---- torch.compile ----


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dora", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS[1:])])
def test_forward_compiles_without_a_graph_break_for_dora(method):
    """DoRA compiles whole. A mixture's sorted path reads counts on the host, so it compiles whole for few tokens."""
    model = tiny_model("llama", method)
    ids = token_ids(1, 1) if method != "dora" else token_ids()
    expected = logits(model, ids, use_cache=False)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inductor's own
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
        got = logits(compiled, ids, use_cache=False)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_the_router_is_trained_by_the_task_alone():
    """Without a balance loss the router still gets a gradient, through the weights of the chosen experts."""
    model = CAUSAL_LM["mixlora"].from_base(tiny_base(), tiny_config("mixlora", router_aux_loss_coef=0.0)).train()
    fill_adapter(model)
    ids = token_ids()
    model(ids, labels=ids).loss.backward()
    assert model.adapter_parameters()["layers.0.mlp.router"].grad.abs().max() > 0
