"""Rows that stay for more than one forward: the updates of their adapters are stacked, and nothing else changes."""

from __future__ import annotations

import pytest
import tiny
import torch
from compare.bank_models import different_prompts, run

from minilora_hub.compare.adapter_bank import AdapterBank

NAMES = [None, "dora", "lora", "dora-small", "patterns", None, "mix", "mixdora", "rslora"]


def loaded(folders, **settings) -> AdapterBank:
    bank = AdapterBank(tiny.tiny_base(), **settings)
    for name in NAMES:
        if name is not None and bank.find(name) is None:
            bank.load(name, folders[name])
    return bank


def again(bank, names, ids):
    """Logits of the second forward with these rows."""
    run(bank, names, ids)
    return run(bank, names, ids)


def require_equal_to_alone(logits, names, models, ids):
    for row, name in enumerate(names):
        assert (logits[row] - tiny.logits(models[name], ids[row : row + 1])[0]).abs().max() < 1e-4, name


@pytest.mark.parametrize("length", [1, 4])
def test_rows_that_stay_equal_each_alone(folders, models, length):
    """Different ranks, targets and kinds, one row or two of each; the rows that come next have stacks of their own."""
    bank = loaded(folders)
    own = bank.memory().adapters
    for names in (NAMES, NAMES[1:4], ["lora", "dora", "lora", "mix"], [name for name in NAMES[1:5] for _ in range(2)]):
        ids = different_prompts(len(names), length)
        first, second = run(bank, names, ids), run(bank, names, ids)
        require_equal_to_alone(second, names, models, ids)
        assert (first - second).abs().max() < 1e-4
        assert own < bank.memory().adapters < 3 * own


def test_stacks_end_with_an_adapter_that_is_unloaded(folders, models):
    """Another adapter of its name has none of it, and the memory comes back."""
    bank = loaded(folders)
    names, ids = ["dora", "lora", "mix"], different_prompts(3, 2)
    again(bank, names, ids)
    bank.unload("lora")
    bank.load("lora", folders["rslora"])
    require_equal_to_alone(again(bank, names, ids), names, models | {"lora": models["rslora"]}, ids)
    for entry in bank.list():
        bank.unload(entry.name)
    assert bank.memory().adapters == 0


def test_stacks_keep_to_the_limit(folders, models):
    """Where they don't fit, rows are computed without them; a new adapter takes their place."""
    own = loaded(folders).memory().adapters
    ids = different_prompts(len(NAMES), 2)
    for room in (0, 2000):
        bank = loaded(folders, limit=own + room)
        require_equal_to_alone(again(bank, NAMES, ids), NAMES, models, ids)
        assert own + room // 2 <= bank.memory().adapters <= own + room
        with bank.use([name for name in NAMES if name is not None]):
            bank.load("more", folders["one-layer"])
            assert bank.memory().adapters <= max(own + room, own + bank.find("more").bytes)


def test_rows_that_are_not_a_number_stay_alone(folders, models):
    """Of stacked adapters, one that computes NaN changes no other row."""
    bank = loaded(folders)
    names, ids = ["dora", "lora", "dora-small"], different_prompts(3, 1)
    layer = bank.model.model.layers[0].self_attn.o_proj
    layer.updates["lora"].lora_b.fill_(float("nan"))
    logits = again(bank, names, ids)
    assert logits[1].isnan().all()
    for row in (0, 2):
        assert (logits[row] - tiny.logits(models[names[row]], ids[row : row + 1])[0]).abs().max() < 1e-4


def test_gradients_flow_through_stacks_that_were_made_in_inference_mode(folders, models):
    bank = loaded(folders)
    names, ids = ["dora", "lora"], different_prompts(2, 2)
    with torch.inference_mode():
        again(bank, names, ids)
    with torch.enable_grad(), bank.use(names), bank.rows(names):
        logits = bank.model(ids).logits
    logits.sum().backward()
    require_equal_to_alone(logits.detach(), names, models, ids)
