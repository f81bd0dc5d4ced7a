"""The same comparisons as tests/remote_code, on the embedded SmolLM2-135M: the real sizes, and the shipped adapters."""

import copy

import pytest
import torch
from peft import PeftModel
from reference import peft_twin, reference_in_double, reference_mixlora
from tiny import fill_adapter, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

import minilora_hub
from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.compare.found_adapters import shared_copy, shipped_adapters
from minilora_hub.remote_code.adapter_files import base_fingerprint

TEXT = "The quick brown fox jumps over the lazy dog. In 1990, 42 people saw it: ¿qué pasó? def f(x): return x + 1\n"


@pytest.fixture(scope="module")
def base():
    return AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path)


@pytest.fixture(scope="module")
def ids():
    return AutoTokenizer.from_pretrained(resolve_base("embedded").path)(TEXT, return_tensors="pt").input_ids


@pytest.mark.slow
def test_dora_equals_peft(base, ids):
    model = DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=16))
    fill_adapter(model, scale=0.02)
    twin = peft_twin(copy.deepcopy(base), model.adapter_parameters(), model.config)
    difference = (logits(model, ids) - logits(twin, ids)).abs().max().item()
    effect = (logits(model, ids) - logits(base, ids)).abs().max().item()
    print(f"DoRA against PEFT on SmolLM2-135M: {difference:.1e}, an effect of {effect:.1f} in logits")
    assert effect > 1
    assert difference < 1e-4


@pytest.mark.slow
def test_mixlora_equals_the_reference_package(base, ids, tmp_path):
    model = MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=16))
    fill_adapter(model, scale=0.02)
    twin = reference_in_double(reference_mixlora(copy.deepcopy(base), model, tmp_path))
    model.double()  # in float32 the two ways to round differ by 1e-4 after 30 layers
    difference = (logits(model, ids) - logits(twin, ids)).abs().max().item()
    effect = (logits(model, ids) - logits(base, ids)).abs().max().item()
    print(f"MixLoRA against the mixlora package on SmolLM2-135M: {difference:.1e}, an effect of {effect:.1f} in logits")
    assert effect > 1
    assert difference < 1e-4


@pytest.mark.parametrize(
    "folder",
    [
        pytest.param(folder, id=folder.name, marks=[pytest.mark.slow] * folder.name.endswith(("-dora", "-mixdora")))
        for folder in shipped_adapters()
    ],
)
def test_a_shipped_adapter_loads_on_the_base_it_names(folder, ids):
    minilora_hub.register()
    embedded = resolve_base("embedded").path
    if (folder / "adapter_config.json").is_file():  # PEFT's format, in which a base is one on the Hub, or handed over
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(embedded, dtype="float32"), folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, base_model="embedded")
        assert model.config.base_fingerprint == base_fingerprint(embedded)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Write as YYYY-MM-DD: January 30, 1916"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "1916-01-30"
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, model.unload()(ids).logits, atol=0.1)
