"""Every family of base: fresh output, one training step, save, load, generate; and the base given back unchanged."""

import copy

import pytest
import torch
from tiny import (
    CAUSAL_LM,
    FAMILIES,
    HEADLESS,
    METHODS,
    OTHER_FAMILIES,
    fill_adapter,
    logits,
    tiny_base,
    tiny_config,
    tiny_model,
    token_ids,
)
from transformers import AutoConfig, AutoModelForCausalLM

from minilora_hub.remote_code.base_structure import plan_sites

TIE_MARGIN = 1e-4


def assert_same_tokens(model, got, other, prompt_length):
    """Greedy tokens agree, except where the two best logits are closer than TIE_MARGIN."""
    for row, (a, b) in enumerate(zip(got, other, strict=True)):
        if torch.equal(a, b):
            continue
        first = int((a != b).nonzero()[0])
        assert first >= prompt_length
        best = logits(model, a[None, :first])[0, -1].topk(2).values
        assert best[0] - best[1] < TIE_MARGIN, f"row {row} differs at {first}: {a.tolist()} / {b.tolist()}"


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "family",
    [
        family if family in ("llama", "gemma2", "phi3", "gpt2") else pytest.param(family, marks=pytest.mark.slow)
        for family in (*FAMILIES, *OTHER_FAMILIES)
    ],
)
def test_train_save_load_generate(family, method, biases, tmp_path):
    base = tiny_base(family, biases=biases)
    before = logits(base)
    model = CAUSAL_LM[method].from_base(copy.deepcopy(base), tiny_config(method))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)

    ids = token_ids()
    fill_adapter(model)
    model.train()
    optimizer = torch.optim.AdamW(model.adapter_parameters().values(), lr=1e-2)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters().values())
    assert all(parameter.grad is None for parameter in model._trainable_before)
    optimizer.step()
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=1e-3)

    model.save_pretrained(tmp_path)
    loaded = CAUSAL_LM[method].from_pretrained(tmp_path, base_model=copy.deepcopy(base))
    assert torch.equal(logits(loaded), trained)
    mask = torch.ones_like(ids)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = loaded.generate(ids, use_cache=True, **settings)
    assert with_cache.shape == (2, 21)
    assert_same_tokens(loaded, with_cache, loaded.generate(ids, use_cache=False, **settings), ids.shape[1])

    assert torch.equal(logits(model.unload()), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_one_file_serves_the_model_with_and_without_its_head(family, method, tmp_path):
    model = tiny_model(family, method)
    model.save_pretrained(tmp_path)
    base = tiny_base(family)
    headless = copy.deepcopy(base.base_model)
    body = HEADLESS[method].from_pretrained(tmp_path, base_model=headless)
    with torch.no_grad():
        hidden = body(token_ids()).last_hidden_state
        torch.testing.assert_close(base.get_output_embeddings()(hidden), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_from_config_builds_base_and_adapter(method):
    config = copy.deepcopy(tiny_model("llama", method).config)
    model = CAUSAL_LM[method]._from_config(config)
    assert logits(model).shape == (2, 9, 128)
    assert model.num_adapter_parameters() == tiny_model("llama", method).num_adapter_parameters()


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
@pytest.mark.parametrize("tied", [False, True])
def test_merge_gives_a_plain_model_with_the_same_outputs(family, tied):
    base = tiny_base(family, biases=True, tie_word_embeddings=tied)
    model = CAUSAL_LM["dora"].from_base(copy.deepcopy(base), tiny_config("dora"))
    fill_adapter(model)
    expected = logits(model)
    merged = model.merge()
    assert type(merged) is type(base)
    assert merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)


def test_merging_into_a_weight_that_another_module_shares_is_refused():
    """It would change what the other module computes, which the adapter left alone or adapted in another way."""
    base = tiny_base("llama")
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = CAUSAL_LM["dora"].from_base(base, tiny_config("dora"))
    fill_adapter(model)
    before = logits(model)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj: model\.layers\.1\.mlp\.up_proj shares its weight"):
        model.merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_merging_a_mixture_is_refused_and_changes_nothing(method):
    model = tiny_model("llama", method)
    before = logits(model)
    with pytest.raises(ValueError, match=r"cannot be merged.*Mixtral"):
        model.merge()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("strategy", ["top_p", "switch"])
def test_merging_is_refused_without_naming_an_export_that_is_refused_too(strategy):
    with pytest.raises(ValueError, match=r"cannot be merged: every token takes its own experts\.$"):
        tiny_model("llama", "mixlora", routing_strategy=strategy).merge()


@pytest.mark.parametrize("method", METHODS)
def test_unload_restores_requires_grad(method):
    base = tiny_base()
    base.get_input_embeddings().weight.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    model = CAUSAL_LM[method].from_base(base, tiny_config(method))
    assert {n for n, p in model.named_parameters() if p.requires_grad}.isdisjoint(f"base.{n}" for n in flags)
    restored = {name: parameter.requires_grad for name, parameter in model.unload().named_parameters()}
    assert restored == flags


@pytest.mark.parametrize("method", METHODS)
def test_fresh_adapters_are_seeded_and_leave_the_random_state_alone(method):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    base = tiny_base()
    torch.random.set_rng_state(state)
    models = [CAUSAL_LM[method].from_base(copy.deepcopy(base), tiny_config(method), seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, same, other = ([p.detach().clone() for p in m.adapter_parameters().values()] for m in models)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_generation_settings_of_the_base_stay_as_they_were(method, tmp_path):
    base = tiny_base()
    base.generation_config.update(temperature=0.6, top_p=0.8, do_sample=True, repetition_penalty=1.1)
    before = base.generation_config.to_dict()
    model = CAUSAL_LM[method].from_base(base, tiny_config(method))
    assert model.generation_config.to_dict() == before
    model.save_pretrained(tmp_path)
    loaded = CAUSAL_LM[method].from_pretrained(tmp_path, base_model=tiny_base())
    assert (tmp_path / "generation_config.json").exists()
    for name in ("top_k", "top_p", "temperature"):
        assert name not in loaded.config.to_dict()
    torch.manual_seed(0)
    sampled = model.generate(token_ids(), max_new_tokens=4, do_sample=True)
    torch.manual_seed(0)
    assert torch.equal(sampled, model.base.generate(token_ids(), max_new_tokens=4, do_sample=True))


# ---- structure ----


def test_a_fused_pair_with_the_up_half_first_is_recognised_by_what_it_computes():
    base = tiny_base("phi3")

    def up_first(self, x):
        up, gate = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * self.activation_fn(gate))

    block = type("UpFirst", (type(base.model.layers[0].mlp),), {"forward": up_first})
    for layer in base.model.layers:
        layer.mlp.__class__ = block
    before = logits(base)
    model = CAUSAL_LM["mixlora"].from_base(base, tiny_config("mixlora"))
    assert model.sites[-1].structure.gate_first is False
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_swapped_names_of_gate_and_up_are_recognised_by_what_they_compute():
    base = tiny_base("llama")

    def swapped(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))

    block = type("Swapped", (type(base.model.layers[0].mlp),), {"forward": swapped})
    for layer in base.model.layers:
        layer.mlp.__class__ = block
    model = CAUSAL_LM["mixlora"].from_base(base, tiny_config("mixlora"))
    assert model.sites[-1].structure.inputs == ("up_proj", "gate_proj")


def test_a_block_that_computes_something_else_is_refused_with_its_path():
    base = tiny_base("llama")

    def odd(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x) * 2)

    base.model.layers[1].mlp.__class__ = type("Odd", (type(base.model.layers[0].mlp),), {"forward": odd})
    with pytest.raises(ValueError, match=r"model\.layers\.1 .*model\.layers\.1\.mlp \(Odd\)"):
        plan_sites(base, tiny_config("mixlora"))


def test_a_sparse_mixture_base_is_refused_with_its_path():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"model\.layers\.0 \(MixtralDecoderLayer\): no feed-forward block"):
        plan_sites(base, tiny_config("mixlora"))


def test_attention_linears_get_plain_lora_and_feed_forward_linears_get_experts():
    names = tiny_model("llama", "mixlora", target_modules=["q_proj", "down_proj"]).adapter_parameters()
    assert set(names) == {
        f"layers.{layer}.{name}"
        for layer in range(2)
        for name in (
            "self_attn.q_proj.lora_A",
            "self_attn.q_proj.lora_B",
            "mlp.router",
            "mlp.experts.down_proj.lora_A",
            "mlp.experts.down_proj.lora_B",
        )
    }
