"""Join key/value caches of batches whose rows have different lengths, and remove columns that are padding in every row.

Rows are aligned at their last token, so a shorter row is padded on the left; the attention mask hides the padding. Keys
and values of whole or sliding attention can be joined this way. The states of other layers (convolutions, recurrences)
can't be padded, so a batch of such a model takes no rows after it has begun.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import cache_utils
from transformers.cache_utils import DynamicSlidingWindowLayer

# Layers that attend to the keys of another layer hold nothing; newer versions of transformers have a class for them.
JOINABLE = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer")
    if hasattr(cache_utils, name)
)


def can_join(cache: Any) -> bool:
    """Return whether every layer of a cache holds plain keys and values of whole or sliding attention, or nothing."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(type(layer) in JOINABLE for layer in layers)


def join_caches(first: Any, second: Any) -> None:
    """Add the rows of the cache `second` to `first`; the shorter one is padded on the left.

    Args:
        first: a cache for which `can_join` holds; changed in place.
        second: a cache of the same model.
    """
    for ours, theirs in zip(first.layers, second.layers, strict=True):
        if ours.keys is None:
            continue
        length = max(ours.get_seq_length(), theirs.get_seq_length())
        kept = _kept(ours, length)
        for name in ("keys", "values"):
            parts = [getattr(layer, name) for layer in (ours, theirs)]  # each (rows, heads, tokens, head size)
            padded = [F.pad(part, (0, 0, kept - part.shape[-2], 0)) for part in parts]
            setattr(ours, name, torch.cat(padded))
        if isinstance(ours, DynamicSlidingWindowLayer):
            ours.cumulative_length = length


def remove_left(cache: Any, columns: int) -> None:
    """Remove the oldest `columns` of every row, which must be padding in every row.

    Args:
        cache: a cache for which `can_join` holds; changed in place.
        columns: how many.
    """
    for layer in cache.layers:
        if layer.keys is None:
            continue
        length = layer.get_seq_length() - columns
        kept = _kept(layer, length)
        layer.keys, layer.values = (
            part[:, :, part.shape[-2] - kept :].contiguous() for part in (layer.keys, layer.values)
        )
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length


def _kept(layer: Any, length: int) -> int:
    """Return how many of `length` columns a layer keeps."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length
