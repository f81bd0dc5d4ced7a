"""Attention over packed rows, compared with the formula of attention, row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers.models.llama import modeling_llama

from minilora_hub.serving.packed_attention import ATTENTIONS

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def expected(query, key, value, window):
    """softmax(q kᵀ / √d) v of one row in float64; a query sees the keys up to its own, of its window."""
    group = HEADS // KEY_HEADS
    key, value = (states.double().repeat_interleave(group, dim=0) for states in (key, value))
    scores = query.double() @ key.mT / math.sqrt(SIZE)
    for place in range(query.shape[1]):
        own = key.shape[1] - query.shape[1] + place
        scores[:, place, own + 1 :] = -math.inf
        if window:
            scores[:, place, : max(own + 1 - window, 0)] = -math.inf
    return (scores.softmax(-1) @ value).transpose(0, 1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "rows",
    [
        [(1, 5)],
        [(1, 7), (1, 7), (1, 7)],
        [(1, 7), (1, 3), (1, 7), (1, 3), (1, 7)],  # rows of one length that are not adjacent
        [(4, 4), (1, 6), (2, 5), (1, 6), (4, 4), (2, 5), (1, 1)],
    ],
)
def test_each_row_has_its_own_attention(rows, name, window):
    generator = torch.Generator().manual_seed(len(rows))
    query = torch.randn(1, HEADS, sum(queries for queries, _ in rows), SIZE, generator=generator)
    key, value = (torch.randn(1, KEY_HEADS, sum(keys for _, keys in rows), SIZE, generator=generator) for _ in "kv")
    starts = [torch.tensor([0, *itertools.accumulate(row[place] for row in rows)]) for place in (0, 1)]
    module = modeling_llama.LlamaAttention(
        modeling_llama.LlamaConfig(hidden_size=32, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS), 0
    )
    attention, _ = ATTENTIONS[name]
    found, _ = attention(
        module,
        query,
        key,
        value,
        None,
        scaling=1 / math.sqrt(SIZE),
        sliding_window=window,
        cu_seq_lens_q=starts[0],
        cu_seq_lens_k=starts[1],
    )
    assert found.shape == (1, query.shape[2], HEADS, SIZE)
    for row, (queries, keys) in enumerate(rows):
        first, key_first = starts[0][row], starts[1][row]
        own = (states[0, :, key_first : key_first + keys] for states in (key, value))
        right = expected(query[0, :, first : first + queries], *own, window)
        torch.testing.assert_close(found[0, first : first + queries].double(), right, rtol=0, atol=1e-5)
