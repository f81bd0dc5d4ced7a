"""Adapters on bases whose checkpoint is quantized, in the bank: as loaded alone, and on no other base."""

from __future__ import annotations

import pytest
import torch
from tiny_training import write_base
from transformers import AutoModelForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM
from minilora_hub.bases.quantizing import quantize_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.errors import AdapterError


@pytest.mark.parametrize("kind", ["nf4", "int3"])
def test_an_adapter_answers_on_its_own_base_only(kind, tmp_path):
    if kind != "nf4":
        pytest.importorskip("torchao")
    base, folder = write_base(tmp_path / "base", intermediate_size=1024), tmp_path / kind
    quantize_base(str(base), kind, folder)
    alone = DoraForCausalLM.from_base(str(folder), DoraConfig(r=4))
    with torch.no_grad():
        for name, parameter in alone.adapter_parameters().items():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    alone.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(20)[None] + 40
    banks = {}
    for where in (folder, base):
        banks[where] = AdapterBank(AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval())
        banks[where].register("one", tmp_path / "adapter")
    with torch.no_grad(), banks[folder].use(["one"]), banks[folder].rows(["one"]):
        found = banks[folder].model(ids).logits
    torch.testing.assert_close(found, alone.eval()(ids).logits, atol=1e-4, rtol=1e-4)
    error = "was trained on a base quantized with"
    with pytest.raises((AdapterError, ValueError), match=error), banks[base].use(["one"]):
        pass
