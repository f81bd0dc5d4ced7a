"""What only a GPU can show, as one command: ``pytest -m gpu``. Left out of the ordinary run; never run so far.

``MINILORA_GPU_DEVICE=cpu pytest -m gpu`` runs the same code on a CPU, which shows that the tests themselves work.
"""

import os

import pytest
import torch
from tiny import CAUSAL_LM, METHODS, fill_adapter, logits, tiny_base, tiny_config, token_ids
from transformers import BitsAndBytesConfig
from transformers.utils import is_flash_attn_2_available

from minilora_hub.remote_code import mixture

pytestmark = pytest.mark.gpu
DEVICE = os.environ.get("MINILORA_GPU_DEVICE", "cuda")


@pytest.fixture
def saved(tmp_path):
    """A base on disk, and for each method an adapter saved from the CPU with the logits it gave there."""
    tiny_base(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    expected = {}
    for method in METHODS:
        model = CAUSAL_LM[method].from_base(str(tmp_path / "base"), tiny_config(method))
        fill_adapter(model)
        model.eval()
        expected[method] = logits(model)
        model.save_pretrained(tmp_path / method)
    return tmp_path, expected


def load(folder, method, **arguments):
    return CAUSAL_LM[method].from_pretrained(folder / method, device_map=DEVICE, **arguments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tokens", [1, 9])
def test_the_adapter_follows_its_base_to_the_device(saved, method, tokens):
    """Few tokens take the gathered path there, many the sorted one: both agree with the CPU."""
    folder, expected = saved
    model = load(folder, method)
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    got = logits(model, token_ids()[:, :tokens].to(DEVICE)).cpu()
    torch.testing.assert_close(got, expected[method][:, :tokens], rtol=0, atol=2e-3)
    assert model.generate(token_ids().to(DEVICE), max_new_tokens=4, do_sample=False).shape == (2, 13)


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_decoding_never_waits_for_the_device(saved, method):
    """The gathered path reads no index on the host; CUDA's own check raises if anything does."""
    folder, _ = saved
    model = load(folder, method)
    block = next(m for m in model.modules() if isinstance(m, mixture.MixtureOfLoraExperts))
    x = torch.randn(1, 1, 64, device=DEVICE)
    with torch.no_grad():
        block(x)  # fills DoRA's caches
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            block(x)
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_many_tokens_in_bf16_never_wait_either(method):
    """One grouped product serves all experts; it agrees with the blocks that a CPU multiplies."""
    base = tiny_base(hidden_size=64, intermediate_size=128).to(torch.bfloat16)
    model = CAUSAL_LM[method].from_base(base, tiny_config(method, r=8), adapter_dtype=torch.bfloat16)
    fill_adapter(model)
    block = next(m for m in model.modules() if isinstance(m, mixture.MixtureOfLoraExperts))
    x = torch.randn(1, 64, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = block(x).float()
        block.to(DEVICE)
        x = x.to(DEVICE)
        block(x)  # fills DoRA's caches
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            got = block(x).float().cpu()
        finally:
            if DEVICE == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(saved, method, dtype):
    folder, _ = saved
    model = load(folder, method, dtype=dtype).train()
    ids = token_ids().to(DEVICE)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.adapter_parameters().values())


@pytest.mark.parametrize("method", METHODS)
def test_flash_attention_reaches_the_base(saved, method):
    if DEVICE != "cuda" or not is_flash_attn_2_available():
        pytest.skip("flash-attn is not installed: pip install 'minilora_hub[flash]'")
    folder, _ = saved
    flash = load(folder, method, dtype=torch.bfloat16, attn_implementation="flash_attention_2")
    assert flash.base.config._attn_implementation == "flash_attention_2"
    plain = load(folder, method, dtype=torch.bfloat16, attn_implementation="eager")
    ids = token_ids().to(DEVICE)
    torch.testing.assert_close(logits(flash, ids), logits(plain, ids), rtol=0, atol=0.2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases_load_and_train(saved, method, bits):
    folder, _ = saved
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    model = load(folder, method, quantization_config=BitsAndBytesConfig(**settings)).train()
    ids = token_ids().to(DEVICE)
    model(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.adapter_parameters().values())
