"""A bank with an adapter of every kind, and engines on models small enough to run in milliseconds."""

from __future__ import annotations

import pytest
import tiny
import tiny_stand_ins
from compare.bank_models import make_models

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import CompareEngine


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("bank")
    for name, model in models.items():
        if name is not None:
            model.save_pretrained(root / name)
    return {name: root / name for name in models if name is not None}


@pytest.fixture
def bank(folders):
    bank = AdapterBank(tiny.tiny_base())
    for name, folder in folders.items():
        bank.load(name, folder)
    return bank


@pytest.fixture
def engine(saved):
    """The base, a MixLoRA, a DoRA and a LoRA."""
    base, adapters = saved
    return CompareEngine(base, adapters, device="cpu")


@pytest.fixture
def parrots(tmp_path):
    """A base that babbles, and two adapters that repeat the prompt."""
    folders = tiny_stand_ins.save_parrots(tmp_path, {"dora": "dora", "mix": "mixlora"})
    return CompareEngine(tiny_stand_ins.ScriptedBase(), folders, tokenizer=tiny_stand_ins.byte_tokenizer())
