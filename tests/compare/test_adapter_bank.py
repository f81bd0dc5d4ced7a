"""Rows of many adapters in one batch give what each gives alone."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from compare.bank_models import different_prompts, make_models, run
from torch.overrides import TorchFunctionMode

from minilora_hub.compare.adapter_bank import AdapterBank


def test_every_kind_in_one_batch_equals_each_alone(bank, models):
    """Elementwise, rows of each adapter next to each other and the bare base between them."""
    names = [None, *list(models)[1:], None, "mix", "mix", None, "lora", "lora", "lora"]
    ids = different_prompts(len(names))
    together = run(bank, names, ids)
    for row, name in enumerate(names):
        expected = tiny.logits(models[name], ids[row : row + 1])[0]
        assert (together[row] - expected).abs().max() < 1e-4, name
    distinct = {tuple(together[row, -1].tolist()) for row in range(len(models))}
    assert len(distinct) == len(models)


@pytest.mark.parametrize("family", [*tiny.FAMILIES[1:], *tiny.OTHER_FAMILIES])
def test_families(family, tmp_path):
    """Fused and ungated blocks, biases, Conv1D: all that the island adapts, the bank serves."""
    models = make_models(family)
    bank = AdapterBank(tiny.tiny_base(family))
    for name, model in models.items():
        if name is not None:
            model.save_pretrained(tmp_path / name)
            bank.load(name, tmp_path / name)
    ids = different_prompts(len(models))
    together = run(bank, list(models), ids)
    for row, name in enumerate(models):
        assert (together[row] - tiny.logits(models[name], ids[row : row + 1])[0]).abs().max() < 1e-4, name


def test_biases(tmp_path):
    """DoRA leaves the base's bias out of its scale, in a bank as alone."""
    base, bank = tiny.tiny_base(biases=True), AdapterBank(tiny.tiny_base(biases=True))
    for method in tiny.METHODS:
        model = tiny.CAUSAL_LM[method].from_base(tiny.tiny_base(biases=True), tiny.tiny_config(method))
        tiny.fill_adapter(model)
        model.save_pretrained(tmp_path / method)
        bank.load(method, tmp_path / method)
        ids = different_prompts(3)
        together = run(bank, [None, method, method], ids)
        assert (together[1:] - tiny.logits(model.eval(), ids[1:])).abs().max() < 1e-4
        assert (together[:1] - tiny.logits(base, ids[:1])).abs().max() < 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9])
def test_decoding_with_a_cache(bank, models, count):
    """One token a row and step: few rows take another way through the matrix library."""
    names = (["mix-3", "mixdora", "lora", None, "dora", "mix-top-p", "rslora", "mix", "patterns"])[:count]
    ids = different_prompts(count, 6)
    with torch.no_grad(), bank.use(names), bank.rows(names):
        cache = {tiny.CACHE: bank.model(ids[:, :3], use_cache=True)[tiny.CACHE]}
        steps = [bank.model(ids[:, at : at + 1], **cache).logits for at in range(3, 6)]
    for row, name in enumerate(names):
        expected = tiny.logits(models[name], ids[row : row + 1])[0, 3:]
        assert (torch.cat(steps, dim=1)[row] - expected).abs().max() < 1e-4, name


def test_padded_rows(bank, models):
    """Prompts of different lengths, padded on the left: padding reaches nobody."""
    names, lengths = ["mix", "lora", None, "mixdora"], [3, 7, 5, 6]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 7 - length :], mask[row, 7 - length :] = tiny.token_ids(1, length, seed=row)[0], 1
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    together = run(bank, names, ids, attention_mask=mask, position_ids=positions)
    for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
        expected = tiny.logits(models[name], ids[row : row + 1, 7 - length :])[0]
        assert (together[row, 7 - length :] - expected).abs().max() < 1e-4


def test_a_row_does_not_depend_on_its_neighbours(bank):
    """The same row among others, at another place, of other adapters."""
    ids = different_prompts(4)
    first = run(bank, ["mix", "lora", None, "dora"], ids)
    again = run(bank, [None, "mixdora", "mix", "mix"], ids[[2, 1, 0, 3]])
    assert (first[0] - again[2]).abs().max() < 1e-4
    assert (first[2] - again[0]).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(models, folders, dtype):
    """As the adapter alone in float32, up to rounding, which may also give a token near a tie another expert."""
    bank = AdapterBank(tiny.tiny_base().to(dtype))
    names = ["mix", "dora", "lora", None]
    for name in names[:-1]:
        bank.load(name, folders[name])
    ids = different_prompts(4)
    together = run(bank, names, ids).float()
    for row, name in enumerate(names):
        exact = tiny.logits(models[name], ids[row : row + 1])[0]
        assert (together[row] - exact).norm() < 0.035 * exact.norm()


def test_a_quantised_base(folders, tmp_path):
    """NF4: the base's layers are called, never unpacked, and once for all rows."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    tiny.tiny_base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def base():
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")

    bank, alone = AdapterBank(base()), {}
    for method in ("dora", "mixlora"):
        plain = tiny.tiny_base(hidden_size=64, intermediate_size=64)
        model = tiny.CAUSAL_LM[method].from_base(plain, tiny.tiny_config(method))
        tiny.fill_adapter(model)
        model.save_pretrained(tmp_path / method)
        kind = {"dora": DoraForCausalLM, "mixlora": MixLoraForCausalLM}[method]
        alone[method] = kind.from_pretrained(tmp_path / method, base_model=base(), dtype=torch.float32).eval()
        bank.load(method, tmp_path / method)
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in bank.model.modules())
    ids = different_prompts(2)
    together = run(bank, list(alone), ids)
    for row, model in enumerate(alone.values()):
        assert (together[row] - tiny.logits(model, ids[row : row + 1])[0]).abs().max() < 1e-4


class CountProducts(TorchFunctionMode):
    """How often each of these weights is multiplied by something."""

    def __init__(self, weights: dict[int, str]) -> None:
        super().__init__()
        self.weights, self.counts = weights, Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.nn.functional.linear, torch.mm, torch.Tensor.mm, torch.matmul, torch.addmm, torch.bmm):
            for argument in args:
                if isinstance(argument, torch.Tensor) and argument.data_ptr() in self.weights:
                    self.counts[self.weights[argument.data_ptr()]] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("length", [1, 7])
def test_every_base_layer_runs_exactly_once(bank, models, length):
    """Whatever adapters the rows have, in one step of one token a row and of several."""
    weights = {
        module.weight.data_ptr(): path
        for path, module in bank.model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    names = list(models)
    with CountProducts(weights) as products:
        run(bank, names, different_prompts(len(names), length))
    assert len(weights) == 2 * 7 + 1
    assert products.counts == dict.fromkeys(weights.values(), 1)
