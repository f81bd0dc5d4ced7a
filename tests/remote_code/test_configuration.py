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
        ({"format_version": 2}, r"format_version=2: .*1 to 1"),
        ({"num_experts": 0}, r"num_experts=0"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, r"num_experts_per_tok=5: .*1 to num_experts=4"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok=0"),
        ({"expert_r": 0}, r"expert_r=0"),
        ({"expert_alpha": 0}, r"expert_alpha=0"),
        ({"routing_strategy": "top_z"}, r"routing_strategy='top_z'"),
        ({"router_aux_loss_coef": -1}, r"router_aux_loss_coef=-1"),
        ({"router_jitter_noise": 1.5}, r"router_jitter_noise=1\.5"),
        ({"num_expert": 4}, r"num_expert=4: .*did you mean 'num_experts'"),
        ({"lora_alfa": 4}, r"did you mean 'lora_alpha'"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        MixLoraConfig(**fields)


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


@pytest.mark.parametrize("config", [DoraConfig(r=3), MixLoraConfig(num_experts=5, expert_r=2, use_dora=True)])
def test_round_trip(config, tmp_path):
    minilora_hub.register()
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is type(config)
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_nothing_of_the_adapter_reaches_the_generation_settings():
    from_model = GenerationConfig.from_model_config(MixLoraConfig(num_experts_per_tok=2))
    assert not {"top_k", "top_p", "temperature", "do_sample", "max_length"} & from_model.to_diff_dict().keys()
