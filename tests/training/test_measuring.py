"""The experts' share of the tokens, which cards draw, under every routing strategy."""

import pytest
import torch
from tiny import fill_adapter, tiny_config
from tiny_stand_ins import byte_tokenizer, tiny_llama

from minilora_hub import MixLoraForCausalLM
from minilora_hub.training.measuring import expert_load


@pytest.mark.parametrize("strategy", ["top_k", "top_p", "switch"])
def test_load_counts_each_served_token_once_per_expert(strategy):
    model = MixLoraForCausalLM.from_base(tiny_llama(), tiny_config("mixlora", routing_strategy=strategy)).eval()
    fill_adapter(model)
    tokenizer, prompt = byte_tokenizer(), "some words"
    tokenizer.pad_token = tokenizer.eos_token
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    counts = torch.zeros(2, 4)
    selected = model(ids, output_routing=True).selected_experts
    for layer, experts in enumerate(selected):
        for expert in experts.flatten().tolist():
            if expert >= 0:
                counts[layer, expert] += 1
    expected = counts / counts.sum(dim=1, keepdim=True)
    load = torch.tensor(expert_load(model, tokenizer, [prompt]))
    torch.testing.assert_close(load, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.tensor(expert_load(model, tokenizer, [prompt, prompt])), load)
    if strategy == "top_p":
        assert any((experts == -1).any() for experts in selected)
