"""`vllm serve ADAPTER`: a published DoRA, MixLoRA or MixDoRA as a model, its base loaded by vLLM."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; .ci/vllm makes an environment that has it")

from engines.vllm.answers_here import NEW_TOKENS, answers, folder_of, greedy, prompts
from engines.vllm.vllm_processes import answers_of_model
from safetensors.torch import load_file, save_file
from tiny import fill_adapter, tiny_base, tiny_config, token_ids

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

EMBEDDED = {"hf_overrides": {"base_model_name_or_path": "embedded"}}


@pytest.mark.parametrize("method", ["dora", "mixlora", "mixdora"])
def test_the_shipped_adapters(tmp_path, method):
    """In float32, on the embedded base, which the published configuration names by its id on the Hub."""
    found = answers_of_model(folder_of(method), prompts(), NEW_TOKENS, tmp_path, **EMBEDDED)
    assert found == answers(method), found


def test_a_damaged_adapter_is_refused_by_name(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(folder_of("dora"), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors.pop("layers.7.mlp.up_proj.lora_B")
    save_file(tensors, folder / "adapter_model.safetensors")
    found = answers_of_model(folder, prompts()[:1], 1, tmp_path, **EMBEDDED)
    assert isinstance(found, str)
    assert "missing layers.7.mlp.up_proj.lora_B" in found


# vLLM's CPU attention wants heads of 32 or more.
SIZES = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "granite"])
@pytest.mark.parametrize("method", ["dora", "mixlora"])
def test_other_families(tmp_path, family, method):
    """Random weights: the first tokens, before a near tie of two logits can part the answers."""
    sizes = {key: value for key, value in SIZES.items() if key != "head_dim" or family == "qwen3"}
    base = tiny_base(family, **sizes)
    base.save_pretrained(tmp_path / "base")
    kind = DoraForCausalLM if method == "dora" else MixLoraForCausalLM
    model = kind.from_base(str(tmp_path / "base"), tiny_config(method))
    fill_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    ids = token_ids(2, 9).tolist()
    found = answers_of_model(tmp_path / "adapter", ids, 4, tmp_path, skip_tokenizer_init=True)
    assert found == [greedy(model, prompt, 4) for prompt in ids], found
