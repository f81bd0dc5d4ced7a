"""A MixLoRA written as a Mixtral gives the same logits, loaded by transformers alone."""

import pytest
import torch
from tiny import fill_adapter, logits, tiny_base, tiny_config, token_ids
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.errors import AdapterError
from minilora_hub.formats.mixtral import export_mixtral


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"sliding_window": 4}, {"head_dim": 16}])
def test_logits_are_the_same(method, family, changes, tmp_path):
    if family == "llama" and "sliding_window" in changes:
        changes = {"num_key_value_heads": 4}
    model = MixLoraForCausalLM.from_base(tiny_base(family, **changes), tiny_config(method))
    fill_adapter(model)
    before = logits(model)
    export_mixtral(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is MixtralForCausalLM
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-4)
    assert torch.equal(logits(model), before)
    ids = token_ids()
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **settings), model.generate(ids, **settings))


def test_experts_on_some_projections_only(tmp_path):
    config = tiny_config("mixlora", target_modules=["q_proj", "up_proj"])
    model = MixLoraForCausalLM.from_base(tiny_base(), config)
    fill_adapter(model)
    export_mixtral(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: MixLoraForCausalLM.from_base(tiny_base("qwen2"), tiny_config("mixlora")), "base of type 'qwen2'"),
        (lambda: DoraForCausalLM.from_base(tiny_base(), tiny_config("dora")), "only a MixLoRA is a Mixtral"),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base("llama", biases=True), tiny_config("mixlora")),
            "attention_bias=True",
        ),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", routing_strategy="top_p")),
            "routing_strategy='top_p'.*\"top_k\" only",
        ),
        (
            lambda: MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora", routing_strategy="switch")),
            "routing_strategy='switch'.*\"top_k\" only",
        ),
    ],
)
def test_what_is_no_mixtral_is_refused_and_nothing_is_written(model, message, tmp_path):
    with pytest.raises(AdapterError, match=message):
        export_mixtral(model(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("mine")
    model = MixLoraForCausalLM.from_base(tiny_base(), tiny_config("mixlora"))
    with pytest.raises(AdapterError, match="must be a folder that is empty"):
        export_mixtral(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
