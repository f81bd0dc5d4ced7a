"""Answers of the bank in batches against generate, one prompt at a time; routing against the model's own."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import CAUSAL_LM, fill_adapter, tiny_base, tiny_config
from tiny_stand_ins import tiny_llama
from transformers import AutoModelForCausalLM

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError
from minilora_hub.evaluation.generation import generate

LIMIT = 12


def prompts(common: int, vocabulary: int = 250) -> list[list[int]]:
    """Seven prompts of different lengths that begin with the same tokens."""
    rng = torch.Generator().manual_seed(common)
    start = torch.randint(3, vocabulary, (common,), generator=rng).tolist()
    return [start + torch.randint(3, vocabulary, (1 + 3 * i,), generator=rng).tolist() for i in range(7)]


def alone(model, prompt: list[int], ends: list[int]) -> list[int]:
    """transformers' greedy answer to one prompt, without its end."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LIMIT,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=0,
    )[0, len(prompt) :].tolist()
    return out[:-1] if out[-1] in ends else out


def loaded(saved, name):
    base, adapters = saved
    if name is None:
        return AutoModelForCausalLM.from_pretrained(base)
    folder = next(path for path in adapters if path.name == name)
    if name == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    method = {"mix": "mixlora", "dora": "dora"}[name]
    return CAUSAL_LM[method].from_pretrained(folder, base_model=tiny_llama())


@pytest.mark.parametrize("name", [None, "mix", "dora", "lora"])
@pytest.mark.parametrize("common", [0, 5])
def test_answers_are_those_of_generate(saved, name, common):
    base, adapters = saved
    model = loaded(saved, name).eval()
    bank = AdapterBank(AutoModelForCausalLM.from_pretrained(base))
    for folder in adapters:
        bank.load(folder.name, folder)
    asked = prompts(common)
    ends = [alone(model, asked[0], [257])[2]]  # a token that is said, so that rows end at different times
    expected = [alone(model, prompt, ends) for prompt in asked]
    with bank.use([name]):
        found = generate(bank, name, asked, LIMIT, ends)
        assert found.tokens == expected
        assert len({len(tokens) for tokens in found.tokens}) > 1
        assert [generate(bank, name, [prompt], LIMIT, ends).tokens[0] for prompt in asked] == expected
    assert (found.routing is None) == (name != "mix")


def test_the_limit_is_held(saved):
    bank = AdapterBank(AutoModelForCausalLM.from_pretrained(saved[0]))
    found = generate(bank, None, prompts(2), 3, [])
    assert [len(tokens) for tokens in found.tokens] == [3] * 7


@pytest.mark.parametrize(
    "changes", [{}, {"routing_strategy": "top_p"}, {"routing_strategy": "switch"}, {"use_dora": True}]
)
def test_routing_is_that_of_the_model(tmp_path, changes):
    """Every position that was read is counted once for each prompt, and padding never."""
    base = tiny_base()
    model = CAUSAL_LM["mixlora"].from_base(tiny_base(), tiny_config("mixlora", **changes))
    fill_adapter(model)
    model.save_pretrained(tmp_path / "mix")
    bank = AdapterBank(base)
    bank.load("mix", tmp_path / "mix")
    asked = prompts(4, vocabulary=120)
    with bank.use(["mix"]):
        found = generate(bank, "mix", asked, LIMIT, [7])
    experts = model.config.num_experts
    counts = torch.zeros(2, experts, dtype=torch.long)
    entropy, tokens = torch.zeros(2, dtype=torch.double), 0
    for prompt, answer in zip(asked, found.tokens, strict=True):
        read = prompt + answer
        if len(answer) == LIMIT:  # an answer that has not ended: its last token was never read
            read = read[:-1]
        with torch.no_grad():
            out = model(torch.tensor([read]), output_router_logits=True, output_routing=True)
        for layer in range(2):
            for expert in range(experts):
                counts[layer, expert] += (out.selected_experts[layer] == expert).sum()
            p = out.router_logits[layer].double().softmax(-1).flatten(0, -2)
            entropy[layer] += sum(-(x * math.log(x)) for x in p.flatten().tolist() if x > 0) / math.log(experts)
        tokens += len(read)
    assert found.routing.tokens == tokens
    assert found.routing.chosen == counts.tolist()
    assert found.routing.entropy == pytest.approx(entropy.tolist(), rel=1e-5)


def test_sliding_windows_are_respected():
    """Beyond the window nothing is read in common: answers are still those of generate."""
    base = tiny_base("mistral", sliding_window=8)
    bank = AdapterBank(tiny_base("mistral", sliding_window=8))
    asked = prompts(6, vocabulary=120)
    assert generate(bank, None, asked, LIMIT, []).tokens == [alone(base, prompt, []) for prompt in asked]


def test_nan_is_an_error_that_names_the_adapter(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    base, (_, dora, _) = saved
    folder = tmp_path / "huge"
    folder.mkdir()
    for path in dora.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor * 1e30 for name, tensor in load_file(file).items()}, file)
    bank = AdapterBank(AutoModelForCausalLM.from_pretrained(base))
    bank.load("huge", folder)
    with bank.use(["huge"]), pytest.raises(AdapterError, match="adapter 'huge': it computes NaN"):
        generate(bank, "huge", prompts(0), LIMIT, [])
