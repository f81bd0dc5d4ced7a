"""Configurations: defaults, ranges, misspelt names, patterns, round trips."""

import pytest
from transformers import AutoConfig, GenerationConfig

import minilora_hub
from minilora_hub import DoraConfig, MixLoraConfig


def test_defaults_are_pinned():
    mixlora, dora = MixLoraConfig(), DoraConfig()
    assert (mixlora.r, mixlora.lora_alpha, mixlora.num_experts, mixlora.num_experts_per_tok) == (16, 32, 8, 2)
    assert (dora.r, dora.lora_alpha, dora.target_modules, dora.lora_dropout) == (16, 32, "all-linear", 0.0)
    assert (mixlora.model_type, dora.model_type, mixlora.use_dora, dora.use_dora) == ("mixlora", "dora", False, True)
    assert mixlora.router_aux_loss_coef == 0.001
    assert MixLoraConfig(r=8).lora_alpha == 16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0: .*at least 1"),
        ({"r": -3}, r"r=-3"),
        ({"r": 2.5}, r"r=2\.5"),
        ({"r": True}, r"r=True"),
        ({"lora_alpha": 0}, r"lora_alpha=0: .*above 0"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1\.0: .*\[0, 1\)"),
        ({"use_rslora": "yes"}, r"use_rslora='yes'"),
        ({"target_modules": []}, r"target_modules=\[\]"),
        ({"target_modules": "q_proj"}, r"target_modules='q_proj'"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\]=0"),
        ({"alpha_pattern": {"q_proj": -1}}, r"alpha_pattern\['q_proj'\]=-1"),
        ({"format_version": 5}, r"format_version=5: .*1 to 4"),
        ({"num_experts": 0}, r"num_experts=0"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"num_experts_per_tok=5: .*1 to num_experts=4"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0"),
        ({"expert_r": 0}, r"expert_r=0"),
        ({"expert_alpha": 0}, r"expert_alpha=0"),
        ({"routing_strategy": "top_z"}, r"routing_strategy='top_z'"),
        ({"router_aux_loss_coef": -1}, r"router_aux_loss_coef=-1"),
        ({"router_jitter_noise": 1.5}, r"router_jitter_noise=1\.5"),
        ({"routing_strategy": ["top_k"]}, r"routing_strategy=\['top_k'\]: .*\"top_k\", \"top_p\", \"switch\""),
        ({"expert_dropout": 1.0}, r"expert_dropout=1\.0: .*\[0, 1\)"),
        ({"routing_strategy": "top_p", "router_top_p": 0}, r"router_top_p=0: .*above 0, at most 1"),
        ({"routing_strategy": "top_p", "router_top_p": 1.1}, r"router_top_p=1\.1"),
        ({"routing_strategy": "top_p", "router_temperature": -0.1}, r"router_temperature=-0\.1: .*at least 0"),
        ({"routing_strategy": "top_p", "num_experts_per_tok": 2}, r"num_experts_per_tok=2: only .*this is \"top_p\""),
        ({"routing_strategy": "top_p", "expert_capacity": 32}, r"expert_capacity=32: only .*\"switch\" has it"),
        ({"routing_strategy": "switch", "num_experts_per_tok": 2}, r"num_experts_per_tok=2: must be 1 under .*switch"),
        ({"routing_strategy": "switch", "expert_capacity": 0}, r"expert_capacity=0: .*at least 1"),
        ({"routing_strategy": "switch", "expert_capacity": 1.5}, r"expert_capacity=1\.5"),
        ({"routing_strategy": "switch", "router_z_loss_coef": -1}, r"router_z_loss_coef=-1: .*at least 0"),
        ({"routing_strategy": "switch", "router_sparse_step": 0}, r"router_sparse_step=0: .*at least 1"),
        (
            {"routing_strategy": "switch", "router_top_p": 0.8},
            r"router_top_p=0\.8: only .*\"top_p\" has it.*\"switch\"",
        ),
        ({"router_top_p": 0.5}, r"router_top_p=0\.5: only .*\"top_p\" has it, this is \"top_k\""),
        ({"router_temperature": 0.5}, r"router_temperature=0\.5: only"),
        ({"expert_capacity": 8}, r"expert_capacity=8: only"),
        ({"router_z_loss_coef": 0.1}, r"router_z_loss_coef=0\.1: only"),
        ({"router_sparse_step": 2}, r"router_sparse_step=2: only"),
        ({"top_k": 2}, r"top_k=2: .*called 'num_experts_per_tok'"),
        ({"routing_strategy": "top_p", "top_p": 0.8}, r"top_p=0\.8: .*called 'router_top_p'"),
        ({"ffn_dropout": 0.1}, r"ffn_dropout=0\.1: .*called 'expert_dropout'"),
        ({"num_expert": 4}, r"num_expert=4: .*did you mean 'num_experts'"),
        ({"lora_alfa": 4}, r"did you mean 'lora_alpha'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**fields)


def test_each_strategy_has_the_references_defaults():
    top_k, top_p, switch = (MixLoraConfig(routing_strategy=name) for name in ("top_k", "top_p", "switch"))
    assert (top_k.router_init_range, top_k.router_jitter_noise, top_k.expert_dropout) == (0.02, 0.0, 0.0)
    assert (top_p.router_top_p, top_p.router_temperature, top_p.num_experts_per_tok) == (0.8, 0.0, None)
    assert (top_p.router_init_range, top_p.router_jitter_noise) == (0.02, 0.0)
    assert (switch.expert_capacity, switch.router_z_loss_coef, switch.router_sparse_step) == (32, 0.001, 1)
    assert (switch.router_init_range, switch.router_jitter_noise, switch.num_experts_per_tok) == (1.0, 0.01, 1)
    given = MixLoraConfig(routing_strategy="switch", router_init_range=0, router_jitter_noise=0)
    assert (given.router_init_range, given.router_jitter_noise) == (0, 0)


def test_a_file_of_a_strategy_names_its_fields_and_no_others():
    """Code of before there were strategies reads a top-k file; it refuses names close to its own that it lacks."""
    foreign = {"router_top_p", "router_temperature", "expert_capacity", "router_z_loss_coef", "router_sparse_step"}
    assert not foreign & MixLoraConfig().to_diff_dict().keys()
    top_p = MixLoraConfig(routing_strategy="top_p").to_diff_dict()
    assert {"router_top_p", "router_temperature"} <= top_p.keys()
    assert not {"expert_capacity", "num_experts_per_tok"} & top_p.keys()


def test_a_file_from_before_there_were_strategies_loads():
    """The fields as they were written then."""
    before = {
        "model_type": "mixlora",
        "format_version": 1,
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "expert_r": None,
        "expert_alpha": None,
        "routing_strategy": "top_k",
        "router_aux_loss_coef": 0.001,
        "router_init_range": 0.02,
        "router_jitter_noise": 0.0,
        "output_router_logits": False,
    }
    loaded = MixLoraConfig.from_dict(before)
    assert (loaded.num_experts_per_tok, loaded.router_init_range, loaded.expert_dropout) == (3, 0.02, 0.0)
    assert before.items() <= loaded.to_diff_dict().items()


def test_dora_without_dora_is_refused():
    with pytest.raises(ValueError, match=r"use_dora=False: .*PEFT's LoraConfig"):
        DoraConfig(use_dora=False)


def test_patterns():
    config = DoraConfig(r=8, lora_alpha=8, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.1\..*": 4})
    assert config.rank_and_scaling("layers.0.self_attn.q_proj", 8, 8) == (2, 4.0)
    assert config.rank_and_scaling("layers.1.self_attn.v_proj", 8, 8) == (8, 0.5)
    assert config.rank_and_scaling("layers.0.self_attn.xq_proj", 8, 8) == (8, 1.0)
    assert DoraConfig(r=4, lora_alpha=8, use_rslora=True).rank_and_scaling("x", 4, 8) == (4, 4.0)


def test_expert_rank_and_alpha_default_to_the_others():
    assert MixLoraConfig(r=8, lora_alpha=4).expert_rank_and_scaling("x") == (8, 0.5)
    assert MixLoraConfig(r=8, expert_r=2).expert_rank_and_scaling("x") == (2, 2.0)
    assert MixLoraConfig(r=8, expert_r=2, expert_alpha=1).expert_rank_and_scaling("x") == (2, 0.5)


@pytest.mark.parametrize(
    "config",
    [
        DoraConfig(r=3),
        MixLoraConfig(num_experts=5, expert_r=2, use_dora=True, expert_dropout=0.1),
        MixLoraConfig(routing_strategy="top_p", router_top_p=0.6, router_temperature=0.5),
        MixLoraConfig(routing_strategy="switch", expert_capacity=7, router_z_loss_coef=0.0, router_sparse_step=2),
    ],
)
def test_round_trip(config, tmp_path):
    minilora_hub.register()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_nothing_of_the_adapter_reaches_the_generation_settings():
    for config in (MixLoraConfig(num_experts_per_tok=3), MixLoraConfig(routing_strategy="top_p", router_temperature=2)):
        from_model = GenerationConfig.from_model_config(config)
        assert not {"top_k", "top_p", "temperature", "do_sample", "max_length"} & from_model.to_diff_dict().keys()
