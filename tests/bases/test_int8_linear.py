"""Linears of int8 weights against their definition, and bases that are loaded with them."""

import pytest
import tiny_stand_ins
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from minilora_hub.bases.int8_linear import PACKED_ROWS, Int8Linear, store_in_int8
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import resolve_base


def linear(out_features=48, in_features=64, bias=True):
    torch.manual_seed(3)
    return nn.Linear(in_features, out_features, bias=bias).to(torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (PACKED_ROWS,), (PACKED_ROWS + 1,), (2, 7), (0,)])
def test_the_product_is_that_of_the_stored_weight(shape, bias):
    layer = linear(bias=bias)
    stored = Int8Linear(layer)
    x = torch.randn(*shape, 64).to(torch.bfloat16)
    weight = stored.weight.double() * stored.scales.double()[:, None]
    expected = x.double() @ weight.T + (layer.bias.double() if bias else 0)
    out = stored(x)
    assert out.dtype is torch.bfloat16
    assert out.shape == (*shape, 48)
    torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.01)


def test_stored_weights_are_within_half_a_step_of_the_weight():
    layer = linear()
    with torch.no_grad():
        layer.weight[5] = 0  # a row of zeros has no scale of its own
        layer.weight[6] *= 1e-3
    stored = Int8Linear(layer)
    assert stored.weight.dtype is torch.int8
    steps = stored.scales.float()[:, None]
    distance = (stored.weight.float() * steps - layer.weight.float()).abs()
    # The largest value of a row lies up to 127 * 2**-9 of a step beyond 127 steps, as the scale is rounded to bfloat16.
    assert (distance <= 0.76 * steps).all()
    assert not stored.weight[5].any()
    assert stored.weight[6].abs().max() >= 126


def test_every_linear_of_a_base_is_stored(saved):
    said = []
    base = load_base(resolve_base(saved[0]), dtype="int8", progress=said.append)
    plain = load_base(resolve_base(saved[0]), dtype=torch.bfloat16)
    kinds = {path: type(module) for path, module in plain.named_modules()}
    for path, module in base.named_modules():
        assert type(module) is (Int8Linear if kinds[path] is nn.Linear else kinds[path]), path
    ids = torch.arange(12)[None] + 40
    with torch.inference_mode():
        ours, theirs = base(ids).logits.float(), plain(ids).logits.float()
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
    assert not torch.equal(ours, theirs)


def test_what_cannot_be_stored_is_refused(saved):
    """Nothing is changed then."""
    with pytest.raises(ValueError, match="dtype='int8': is for bases whose weights are linears in bfloat16 on a CPU"):
        store_in_int8(tiny_stand_ins.tiny_llama())  # float32
    sizes = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes)).to(torch.bfloat16)
    before = [type(module) for module in gpt2.modules()]
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight is not one"):
        store_in_int8(gpt2)
    assert [type(module) for module in gpt2.modules()] == before
    with pytest.raises(ValueError, match="dtype='int8' on cuda: is for CPUs"):
        load_base(resolve_base(saved[0]), dtype="int8", device="cuda")
