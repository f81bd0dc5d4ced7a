"""Where fresh adapters go: only where a trial run of the base shows that they have an effect, in many architectures."""

import copy
import re
import warnings

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from tiny import CAUSAL_LM, METHODS, fill_adapter, logits, tiny_base, tiny_config, token_ids
from tiny_architectures import ARCHITECTURES, tiny_architecture, tiny_vision_language
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import minilora_hub
from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraForCausalLM, MixLoraPeftConfig
from minilora_hub.remote_code import probe
from minilora_hub.remote_code.base_structure import ExpertsSite, plan_sites
from minilora_hub.remote_code.layer_stacks import find_decoder_layers, linears_in
from minilora_hub.remote_code.probe import TargetsWarning, find_without_effect

NOT_CALLED = "the base does not call it"
LEFT_OUT = {  # the others are adapted on every linear of their layers
    "mamba": {"mixer.dt_proj": NOT_CALLED},
    "falcon_mamba": {"mixer.dt_proj": NOT_CALLED},
    "jamba": {"mamba.dt_proj": NOT_CALLED},
    "llama4_text": {"feed_forward.router": "it returns a tuple"},
    "phimoe": {"mlp.router": "it returns a tuple"},
    "gemma3n_text": {"altup.correction_coefs": NOT_CALLED},  # in training only
}
FUSED = {"jamba": "feed_forward.experts", "granitemoe": "block_sparse_moe.experts"} | dict.fromkeys(
    ("mixtral", "phimoe", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3"), "mlp.experts"
)
"""Stacked experts, which are adapted with the linears."""
UNKNOWN_EXPERTS = {"llama4_text": "feed_forward.experts.gate_up_proj"}


def adapted(base, **config):
    """(model, what was said of its targets)."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TargetsWarning)
        model = DoraForCausalLM.from_base(base, DoraConfig(r=4, **config))
    return model, [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (at % 3 > 0)) for at, name in enumerate(ARCHITECTURES)],
)
def test_every_adapter_learns_and_merges_whatever_the_architecture(name, tmp_path):
    base = tiny_architecture(name)
    plain, before = copy.deepcopy(base), logits(base)
    prefix, layers = find_decoder_layers(base)
    every = {f"{prefix}.{index}.{path}" for index, layer in enumerate(layers) for path in linears_in(layer)}
    parameters = None
    if name in UNKNOWN_EXPERTS:
        with pytest.raises(ValueError, match=rf"stacked parameters.* {re.escape(UNKNOWN_EXPERTS[name])}") as refused:
            adapted(base)
        assert "target_parameters=[]" in str(refused.value)
        parameters = []
    model, said = adapted(base, target_parameters=parameters)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)

    kinds = LEFT_OUT.get(name, {})
    left_out = {path for path in every if any(path.endswith(f".{kind}") for kind in kinds)}
    stacked = [site for site in model.sites if isinstance(site, ExpertsSite)]
    assert {site.path for site in model.sites} - {site.path for site in stacked} == every - left_out
    assert {site.path.partition(".layers.")[2].partition(".")[2] for site in stacked} == {
        FUSED[n] for n in (name,) if n in FUSED
    }
    assert all(len(site.targets) == 2 for site in stacked)
    assert (model.config.target_modules == "all-linear") == (not left_out)
    for kind, reason in kinds.items():
        assert re.search(rf"left out is \S+\.{re.escape(kind)}[,:].*{reason}", said.pop(0))
    assert not said

    fill_adapter(model)
    ids = token_ids()
    model.train()(ids, labels=ids).loss.backward()
    dead = [key for key, parameter in model.adapter_parameters().items() if parameter.grad is None]
    assert not dead
    model.eval()
    trained = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(DoraForCausalLM.from_pretrained(tmp_path, base_model=plain)), trained)
    torch.testing.assert_close(logits(model.merge()), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def test_a_vision_tower_as_deep_as_the_language_model_gets_no_adapter(name):
    for base in (tiny_vision_language(name), tiny_vision_language(name).base_model):
        path, layers = find_decoder_layers(base)
        assert path.endswith("language_model.layers")
        assert len(layers) == 2
    base = tiny_vision_language(name)
    before = logits(base)
    model, _ = adapted(base)
    assert all(site.path.startswith("model.language_model.layers.") for site in model.sites)
    fill_adapter(model)
    assert (logits(model) - before).abs().max() > 0.01


def test_layers_that_could_be_either_are_refused_with_their_paths():
    base = tiny_base()
    base.model.others = copy.deepcopy(base.model.layers)
    with pytest.raises(ValueError, match=r"which list of 2 layers .*\['model\.layers', 'model\.others'\]"):
        find_decoder_layers(base)


# ---- what is refused, and what is left out ----


@pytest.mark.parametrize("targets", [["dt_proj"], ["in_proj", "mixer.dt_proj"]])
def test_a_named_linear_without_effect_is_refused_by_its_path(targets):
    base = tiny_base("mamba")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(
        ValueError, match=r"target_modules=\['\S*dt_proj'\]: .* no effect on backbone\.layers\.0\.mixer\.dt_proj"
    ):
        adapted(base, target_modules=targets)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert type(base.backbone.layers[0].mixer.dt_proj) is nn.Linear


def with_block(base, layer, forward):
    block = base.model.layers[layer].mlp
    block.__class__ = type("Changed", (type(block),), {"forward": forward})
    return base


def detached(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).detach())


def without_up(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x)))


def only_in_evaluation(self, x):
    up = nn.functional.linear(x, self.up_proj.weight) if self.training else self.up_proj(x)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


def only_in_training(self, x):
    up = self.up_proj(x) if self.training else nn.functional.linear(x, self.up_proj.weight)
    return self.down_proj(self.act_fn(self.gate_proj(x)) * up)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (detached, "no gradient reaches it"),
        (without_up, NOT_CALLED),
        (only_in_evaluation, NOT_CALLED),
        (only_in_training, NOT_CALLED),
    ],
)
def test_a_linear_of_one_layer_is_left_out_and_the_file_places_the_rest(forward, reason, tmp_path):
    base = with_block(tiny_base(), 1, forward)
    plain = copy.deepcopy(base)
    for targets in ("all-linear", ["q_proj", "up_proj"]):  # a name that stands for others, too
        model, said = adapted(base, target_modules=targets)
        assert len(said) == 1
        assert re.search(rf"left out is model\.layers\.1\.mlp\.up_proj: {reason}", said[0])
        names = {site.name for site in model.sites}
        assert "layers.1.mlp.up_proj" not in names
        assert len(names) == (13 if targets == "all-linear" else 3)
        fill_adapter(model)
        model.save_pretrained(tmp_path)
        loaded = DoraForCausalLM.from_pretrained(tmp_path, base_model=copy.deepcopy(plain))
        assert {site.name for site in loaded.sites} == names
        assert torch.equal(logits(loaded), logits(model))
        base = model.unload()


def test_a_block_that_is_not_called_is_refused():
    base = tiny_base()
    layer = base.model.layers[1]

    def forward(self, x, *args, **kwargs):
        parts = self.mlp
        return x + parts.down_proj(parts.act_fn(parts.gate_proj(x)) * parts.up_proj(x))

    layer.__class__ = type("Layer", (type(layer),), {"forward": forward})
    with pytest.raises(ValueError, match=r"no effect on model\.layers\.1\.mlp: the base does not call it"):
        MixLoraForCausalLM.from_base(base, tiny_config("mixlora", target_modules=["up_proj", "down_proj"]))


class Experts(nn.Module):
    """A sparse mixture whose experts are modules of their own: every token goes to the first one."""

    def __init__(self, block):
        super().__init__()
        self.experts = nn.ModuleList([block, copy.deepcopy(block), copy.deepcopy(block)])

    def forward(self, x):
        return self.experts[0](x)


def test_experts_that_a_few_tokens_do_not_reach_are_adapted():
    base = tiny_base()
    for layer in base.model.layers:
        layer.mlp = Experts(layer.mlp)
    model, said = adapted(base)
    assert not said
    assert len(model.sites) == 2 * (4 + 3 * 3)


def test_a_linear_that_is_in_two_layers_is_adapted_once():
    base = tiny_base()
    base.model.layers[1].mlp.up_proj = base.model.layers[0].mlp.up_proj
    model, said = adapted(base)
    assert "left out is model.layers.1.mlp.up_proj: it is model.layers.0.mlp.up_proj again" in said[0]
    ids = token_ids()
    model.train()(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.adapter_parameters().values())


def test_mixlora_in_peft_leaves_out_what_has_no_effect(tmp_path):
    minilora_hub.register()
    base = tiny_base()
    for layer in base.model.layers:
        layer.self_attn.unused = nn.Linear(32, 32)
    plain = copy.deepcopy(base)
    config = MixLoraPeftConfig(r=4, num_experts=4, top_k=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.warns(TargetsWarning, match=rf"left out is model\.layers\.0\.self_attn\.unused, .*{NOT_CALLED}"):
        model = get_peft_model(base, config)
    assert "model.layers.0.self_attn.unused" not in model.targeted_module_names
    ids = token_ids()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain, tmp_path)
    assert torch.equal(logits(loaded.eval()), logits(model.eval()))


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3"])
def test_a_mixture_does_not_land_in_the_shared_expert_alone(name):
    minilora_hub.register()
    reason = r"target_modules='all-linear': the experts of this base are stacked parameters"
    with pytest.raises(ValueError, match=reason):
        MixLoraForCausalLM.from_base(tiny_architecture(name), tiny_config("mixlora"))
    config = MixLoraPeftConfig(r=4, num_experts=4, top_k=2, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match=reason):
        get_peft_model(tiny_architecture(name), config)


def test_named_targets_on_a_sparse_base_say_nothing_of_its_experts():
    assert not adapted(tiny_architecture("mixtral"), target_modules=["q_proj"])[1]


# ---- the run ----


class Restless(nn.Module):
    """A block that draws random numbers and counts its calls, in place and by replacing."""

    def __init__(self, block):
        super().__init__()
        self.block = block
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.register_buffer("new", torch.ones(1))
        return self.block(x) + 0 * torch.rand(1)


def test_the_base_stays_as_it_was():
    base = tiny_base(attention_dropout=0.5)
    base.model.layers[0].mlp = Restless(base.model.layers[0].mlp)
    base.model.layers[1].train()
    base.model.layers[0].self_attn.requires_grad_(False)
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable({"use_reentrant": True})
    modes = [(module.training, getattr(module, "gradient_checkpointing", None)) for module in base.modules()]
    needed = [parameter.requires_grad for parameter in base.parameters()]
    hooks = [list(module._forward_hooks) for module in base.modules()]
    state, random_state = copy.deepcopy(base.state_dict()), torch.random.get_rng_state()
    with torch.no_grad():
        assert find_without_effect(base, plan_sites(base, DoraConfig())) == {}
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())
    assert [(m.training, getattr(m, "gradient_checkpointing", None)) for m in base.modules()] == modes
    assert [parameter.requires_grad for parameter in base.parameters()] == needed
    assert all(parameter.grad is None for parameter in base.parameters())
    assert [list(module._forward_hooks) for module in base.modules()] == hooks


@pytest.mark.parametrize("method", METHODS)
def test_offloaded_weights_are_fetched_for_the_run(method):
    base = tiny_base()
    before = logits(base)
    cpu_offload(base, execution_device="cpu")
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    model = CAUSAL_LM[method].from_base(base, tiny_config(method))
    assert model.base.model.layers[0].self_attn.q_proj.base_layer.weight.is_meta
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_linears_have_an_effect(kind, tmp_path):
    tiny_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    settings = (
        {"load_in_8bit": True}
        if kind == "int8"
        else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
    assert find_without_effect(base, plan_sites(base, DoraConfig())) == {}


def test_a_base_that_cannot_be_run_is_an_error_that_says_so():
    base = tiny_base()

    def broken(self, x):
        raise RuntimeError("no kernel")

    with_block(base, 0, broken)
    with pytest.raises(ValueError, match=r"base LlamaForCausalLM: it could not be run on 8 tokens.*no kernel"):
        adapted(base)


def test_without_a_backward_pass_the_gradient_is_not_known_and_that_is_told(caplog):
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

    def forward(self, x):
        return NoBackward.apply(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))

    model, said = adapted(with_block(tiny_base(), 0, forward))
    assert len(model.sites) == 14
    assert not said
    assert "Whether every adapter gets a gradient could not be determined" in caplog.text


def test_a_caller_without_gradients_gets_the_same_adapter(caplog):
    with torch.no_grad():
        model, said = adapted(tiny_base())
    assert len(model.sites) == 14
    assert not said
    assert caplog.text == ""


def test_a_base_made_in_inference_mode_is_run_without_gradients(caplog):
    with torch.inference_mode():
        base = tiny_base()
        model, said = adapted(base)
        assert len(model.sites) == 14
    assert not said
    assert "the base was made in inference mode" in caplog.text


def test_a_skeleton_is_not_run(monkeypatch):
    runs = []
    monkeypatch.setattr(probe, "find_without_effect", lambda base, sites: runs.append(base) or {})
    with torch.device("meta"):
        skeleton = tiny_base()
    config, base = tiny_config("dora"), tiny_base()
    probe.settle_targets(skeleton, config)
    assert (config.target_parameters, config.target_modules) == (None, "all-linear")
    assert not runs
    probe.settle_targets(base, config)
    assert runs == [base]


def test_loading_places_as_the_file_says_and_runs_nothing(monkeypatch, tmp_path):
    """Also where all linears were adapted before there was a trial run: such files load as they did."""
    base = tiny_base("mamba")
    with monkeypatch.context() as without:
        without.setattr("minilora_hub.remote_code.adapted_model.settle_targets", lambda *args: None)
        old = DoraForCausalLM.from_base(copy.deepcopy(base), DoraConfig(r=4))
    assert any("dt_proj" in site.name for site in old.sites)
    fill_adapter(old)
    old.save_pretrained(tmp_path)
    monkeypatch.setattr(probe, "find_without_effect", None)
    loaded = DoraForCausalLM.from_pretrained(tmp_path, base_model=base)
    assert loaded.config.target_modules == "all-linear"
    assert torch.equal(logits(loaded), logits(old))
