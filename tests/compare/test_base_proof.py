"""The base's rows against the checkpoint, and that a change of the base is found."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora_hub.compare.base_proof import BareLogits
from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.recording.logits import PROMPTS


def test_the_base_beside_adapters_is_the_checkpoint(saved):
    base, adapters = saved
    engine = CompareEngine(base, adapters, device="cpu", keep_bare_logits=True)
    list(engine.stream("Hello", Sampling(4)))
    forwards = engine.forwards
    proof = engine.base_proof()
    assert proof.ok
    assert proof.difference < 1e-4
    assert proof.prompts == len(PROMPTS)
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    assert proof.same == proof.positions == sum(len(tokenizer(text)["input_ids"]) for text in PROMPTS)
    with torch.no_grad():
        largest = max(model(**tokenizer(text, return_tensors="pt")).logits.abs().max().item() for text in PROMPTS)
    assert proof.largest == pytest.approx(largest, rel=1e-5)
    assert "is the bare checkpoint: over" in proof.described()
    assert engine.forwards == forwards


def test_a_change_of_the_base_is_found_with_its_size(saved):
    """A tensor that base and bank share is written to: the difference is that of the two checkpoints."""
    base, adapters = saved
    engine = CompareEngine(base, adapters[:1], device="cpu", keep_bare_logits=True)
    with torch.no_grad():
        engine.bank.model.lm_head.weight[7] += 0.5
    proof = engine.base_proof()
    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForCausalLM.from_pretrained(base)
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.lm_head.weight[7] += 0.5
        gaps = [
            (model(**one).logits - changed(**one).logits).abs().max().item()
            for one in (tokenizer(text, return_tensors="pt") for text in PROMPTS)
        ]
    assert not proof.ok
    assert proof.difference == pytest.approx(max(gaps), rel=1e-4)
    assert "is NOT the bare checkpoint" in proof.described()


def test_without_bare_logits_there_is_no_proof(saved):
    base, _ = saved
    assert CompareEngine(base, device="cpu").base_proof() is None


def test_nan_is_no_proof(saved):
    base, _ = saved
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    engine = CompareEngine(model, tokenizer=tokenizer)
    bare = BareLogits.of(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    assert not bare.compared_with(engine.bank).ok
