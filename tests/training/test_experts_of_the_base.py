"""Training on a mixture-of-experts base: its stacked experts learn, are saved, continued, compared and published."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import logits, token_ids
from tiny_stand_ins import byte_tokenizer
from tiny_training import CHAT, SHORT
from transformers import AutoConfig, AutoModelForCausalLM

from minilora_hub import CompareEngine, DoraForCausalLM
from minilora_hub.publish.push.build import build
from minilora_hub.training.run import train

EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A tiny Mixtral with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("mixtral")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = CHAT, "<|end|>"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": 256, "pad_token_id": 256, "bos_token_id": None}
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **sizes, **heads, **tokens, initializer_range=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_from_rows_to_a_repo(method, mixtral, rows, tmp_path):
    said = SHORT | {"base": mixtral, "data": rows}
    train(tmp_path / "first", method=method, **said)
    name = "adapter_config.json" if method == "lora" else "config.json"
    assert json.loads((tmp_path / "first" / name).read_text())["target_parameters"] == EXPERTS
    tensors = load_file(tmp_path / "first" / "adapter_model.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "experts" in name)  # every B has learned

    train(tmp_path / "second", from_adapter=str(tmp_path / "first"), data=rows, max_steps=2, batch_size=4, save_every=2)
    again = load_file(tmp_path / "second" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys()
    assert not any(torch.equal(again[name], tensor) for name, tensor in tensors.items() if "lora_B" in name)

    bank = CompareEngine(mixtral, [tmp_path / "second"], device="cpu").bank
    alone = (DoraForCausalLM if method == "dora" else AutoModelForCausalLM).from_pretrained(tmp_path / "second").eval()
    with torch.no_grad(), bank.use(["second"]), bank.rows([None, "second"]):
        both = bank.model(token_ids()).logits
    torch.testing.assert_close(both[1], logits(alone, token_ids()[1:])[0], rtol=0, atol=1e-4)
    assert (both[0] - logits(alone, token_ids()[:1])[0]).abs().max() > 1e-3
    built = build(tmp_path / "second", tmp_path / "built", repo_id="ana/it", base_id="org/base", license="mit")
    assert "mlp.experts.down_proj, mlp.experts.gate_up_proj" in built.card
    assert "vllm serve" not in built.card
    assert (tmp_path / "built" / "peft").exists() is False
