"""The engine over a base in bfloat16 or int8, against each adapter alone in float32 on the same rounded weights."""

import pytest
import tiny_stand_ins
import torch
from peft import PeftModel

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.bases.int8_linear import Int8Linear
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.engine import CompareEngine, Sampling

DTYPES = ["bfloat16", "int8"]


def rounded_base(folder, dtype):
    """A base in float32 whose weights are those that `dtype` stores."""
    stored = load_base(resolve_base(folder), dtype=dtype)
    base = tiny_stand_ins.tiny_llama()
    values = dict(stored.state_dict())
    for path, module in stored.named_modules():
        if isinstance(module, Int8Linear):
            values[f"{path}.weight"] = module.weight.float() * values.pop(f"{path}.scales").float()[:, None]
    base.load_state_dict(values)
    return base.float()


def alone(folder, dtype, adapter):
    base = rounded_base(folder, dtype)
    if adapter is None:
        return base
    if adapter.name == "lora":
        return PeftModel.from_pretrained(base, adapter).eval()
    kind = {"mix": MixLoraForCausalLM, "dora": DoraForCausalLM}[adapter.name]
    return kind.from_pretrained(adapter, base_model=base).eval()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_kind_equal_each_alone(saved, dtype):
    """Within the rounding of bfloat16, together (more rows than the int8 product takes) and one at a time."""
    folder, adapters = saved
    engine = CompareEngine(folder, adapters, device="cpu", dtype=dtype)
    names = [column.adapter for column in engine.columns]
    ids = torch.arange(9)[None] + 60
    with torch.inference_mode():
        with engine.bank.rows(names):
            together = engine.bank.model(ids.repeat(len(names), 1)).logits.float()
        for row, (name, adapter) in enumerate(zip(names, [None, *adapters], strict=True)):
            expected = alone(folder, dtype, adapter)(ids).logits[0]
            with engine.bank.rows([name]):
                single = engine.bank.model(ids[:, :3]).logits.float()[0]
            assert (together[row] - expected).norm() < 0.03 * expected.norm(), name
            assert (single - expected[:3]).norm() < 0.03 * expected[:3].norm(), name
            other = together[(row + 1) % len(names)]
            assert (other - expected).norm() > 0.1 * expected.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_answers_come_from_the_stored_weights(saved, dtype):
    """A stream runs to its end, and the base takes the memory that its dtype says."""
    folder, adapters = saved
    engine = CompareEngine(folder, adapters, device="cpu", dtype=dtype)
    whole = CompareEngine(folder, device="cpu").memory().base
    assert engine.memory().base < (0.6 if dtype == "bfloat16" else 0.45) * whole
    updates = list(engine.stream("Why is the sky blue?", Sampling(6)))
    assert [update.reason for update in updates if update.finished] == ["length"] * 4
    assert not any(update.error for update in updates)


def test_an_unknown_dtype_is_refused_before_loading():
    with pytest.raises(ValueError, match="dtype='fp8': must be one of float32, bfloat16, int8"):
        CompareEngine("no-such-folder", dtype="fp8")
