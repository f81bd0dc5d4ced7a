"""A cache that appends in place holds what transformers' own holds, whatever is done to it."""

import copy
import random
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_base, token_ids
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from minilora_hub.compare import cache_rows
from minilora_hub.compare.cache_rows import GrowingLayer, reserve_room
from minilora_hub.compare.decoding import CachedForward


def states(rows, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2)]


def layers(rows=2, tokens=3):
    """A layer of ours and one of transformers with the same content."""
    pair = GrowingLayer(), DynamicLayer()
    for layer in pair:
        layer.update(*states(rows, tokens, seed=0))
    return pair


def same(ours, theirs):
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert ours.get_seq_length() == theirs.get_seq_length()


@pytest.mark.parametrize("seed", range(20))
def test_random_operations(seed, monkeypatch):
    monkeypatch.setattr(cache_rows, "ROOM", 5)
    choose, (ours, theirs) = random.Random(seed), layers()
    for step in range(60):
        rows = ours.keys.shape[0]
        what = choose.choice(["append"] * 6 + ["many", "crop", "select", "repeat", "reorder"])
        if what in ("append", "many"):
            tokens = 1 if what == "append" else choose.randint(2, 9)
            given = [layer.update(*states(rows, tokens, seed=step)) for layer in (ours, theirs)]
            assert all(torch.equal(a, b) for a, b in zip(*given, strict=True))
        elif what == "crop":
            for layer in (ours, theirs):
                layer.crop(-1)
        elif what == "select":
            kept = torch.tensor(choose.choices(range(rows), k=choose.randint(1, 3)))
            for layer in (ours, theirs):
                layer.batch_select_indices(kept)
        elif what == "repeat" and rows < 4:
            for layer in (ours, theirs):
                layer.batch_repeat_interleave(2)
        elif what == "reorder":
            for layer in (ours, theirs):
                layer.reorder_cache(torch.arange(rows).flip(0))
        same(ours, theirs)


def test_tokens_are_appended_in_place():
    layer, places = layers()[0], set()
    for step in range(cache_rows.ROOM):
        layer.update(*states(2, 1, seed=step))
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))
    assert len(places) == 1
    held = layer.keys.untyped_storage().nbytes()
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.keys.untyped_storage().nbytes() < held / 2 + 1
    assert layer.rooms is None  # which would hold the memory of both rows


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_two_continuations_do_not_meet(duplicate):
    ours, theirs = layers()
    for layer in (ours, theirs):
        layer.update(*states(2, 1, seed=1))
    pairs = [(ours, theirs), (duplicate(ours), copy.deepcopy(theirs))]
    for step in range(4):
        for number, pair in enumerate(pairs):
            for layer in pair:
                layer.update(*states(2, 1, seed=10 * step + number))
    for pair in pairs:
        same(*pair)


def test_a_crop_leaves_views_that_were_taken_before():
    layer = layers()[0]
    before = layer.update(*states(2, 2, seed=1))[0]
    content = before.clone()
    layer.crop(-1)
    layer.update(*states(2, 1, seed=2))
    assert torch.equal(before, content)


def test_other_layers_stay_as_they_are():
    cache = SimpleNamespace(layers=[DynamicLayer(), DynamicSlidingWindowLayer(8), LinearAttentionLayer()])
    reserve_room(cache)
    kinds = [type(layer) for layer in cache.layers]
    assert kinds == [GrowingLayer, DynamicSlidingWindowLayer, LinearAttentionLayer]
    reserve_room(None)
    reserve_room(object())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "phi"])
@torch.no_grad()
def test_logits_are_equal_to_the_bit(family, monkeypatch):
    forward, ids = CachedForward(tiny_base(family)), token_ids(3, 12)
    ours = [forward(piece) for piece in ids.split([5, *[1] * 7], dim=1)]
    monkeypatch.setattr("minilora_hub.compare.decoding.reserve_room", lambda cache: None)
    forward = CachedForward(tiny_base(family))
    theirs = [forward(piece) for piece in ids.split([5, *[1] * 7], dim=1)]
    assert torch.equal(torch.stack(ours), torch.stack(theirs))
