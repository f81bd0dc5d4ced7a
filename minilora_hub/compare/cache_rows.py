"""Key/value caches of batches: append without copying, join, and remove columns that are padding in every row.

Rows are aligned at their last token, so a shorter row is padded on the left; the attention mask hides the padding.

transformers' own layer copies all keys and values for every token. With 16 rows of 512 tokens on SmolLM2-135M these are
377 MB, as much as the model's layers have weights; `GrowingLayer` writes the new ones into memory that it has reserved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import cache_utils
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens per row for which a `GrowingLayer` reserves memory."""


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that appends in place: its keys and values are views of larger tensors.

    Attributes:
        rooms: for keys and for values, the larger tensor, (rows, heads, tokens and room, size), and how many of its
            columns are in use. A shallow copy of the layer shares them: of the two, only the first appends in place.
    """

    rooms: tuple[list[Any], list[Any]] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, each (rows, heads, new tokens, size), and return all of them."""
        if not self.is_initialized or not self.get_seq_length():
            return super().update(key_states, value_states, *args, **kwargs)
        if self.rooms is None:
            self.rooms = ([None, 0], [None, 0])
        self.keys = _append(self.keys, key_states, self.rooms[0])
        self.values = _append(self.values, value_states, self.rooms[1])
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, and free the room of all rows now instead of when the next token comes."""
        super().batch_select_indices(indices)
        self.rooms = None


def _append(held: Any, new: torch.Tensor, room: list[Any]) -> torch.Tensor:
    """Append columns to `held`; it is copied into a new room if it is not the part of `room` that is in use."""
    tensor, used = room
    length = held.shape[-2] + new.shape[-2]
    in_place = (
        tensor is not None
        and held.shape[-2] == used
        and length <= tensor.shape[-2]
        and held.data_ptr() == tensor.data_ptr()
        and held.stride() == tensor.stride()
        and held.shape[:2] == tensor.shape[:2]
    )
    if not in_place:
        tensor = held.new_empty(*held.shape[:-2], length + ROOM, held.shape[-1])
        tensor[..., : held.shape[-2], :] = held
    tensor[..., held.shape[-2] : length, :] = new
    room[:] = tensor, length
    return tensor[..., :length, :]


def reserve_room(cache: Any) -> None:
    """Make every plain `DynamicLayer` of a cache a `GrowingLayer`; other kinds stay as they are."""
    for layer in getattr(cache, "layers", None) or ():
        if type(layer) is DynamicLayer:
            layer.__class__ = GrowingLayer


# Layers that attend to the keys of another layer hold nothing; newer versions of transformers have a class for them.
PLAIN_LAYERS = (GrowingLayer, DynamicLayer, DynamicSlidingWindowLayer) + (
    (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
)


def joins(cache: Any) -> bool:
    """Return whether rows of a cache may be padded on the left after they were computed: whole attention only."""
    return is_plain(cache) and not any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)


def join_rows(cache: Any, other: Any, order: Sequence[int]) -> None:
    """Append the rows of another cache, and sort all; rows of the shorter cache are padded on the left.

    Args:
        cache: a cache for which `joins` holds; changed in place.
        other: another one of the same model.
        order: the index of each row among those of `cache` and then of `other`.
    """
    for layer, theirs in zip(cache.layers, other.layers, strict=True):
        if layer.keys is not None:
            length = max(layer.keys.shape[-2], theirs.keys.shape[-2])
            keys = _joined(layer.keys, theirs.keys, order, length)
            values = _joined(layer.values, theirs.values, order, length)
            layer.keys, layer.values = keys[..., :length, :], values[..., :length, :]
            layer.rooms = ([keys, length], [values, length])


def _joined(one: torch.Tensor, other: torch.Tensor, order: Sequence[int], length: int) -> torch.Tensor:
    rows = [*one, *other]  # each (heads, tokens, size)
    room = one.new_zeros(len(rows), one.shape[1], length + ROOM, one.shape[-1])
    for place, row in enumerate(order):
        room[place, :, length - rows[row].shape[1] : length] = rows[row]
    return room


def is_plain(cache: Any) -> bool:
    """Return whether every layer of a cache holds plain keys and values of whole or sliding attention, or nothing."""
    layers = getattr(cache, "layers", None) or ()
    return bool(layers) and all(type(layer) in PLAIN_LAYERS for layer in layers)


def remove_left(cache: Any, columns: int) -> None:
    """Remove the oldest `columns` of every row, which must be padding in every row.

    Args:
        cache: a cache for which `is_plain` holds; changed in place.
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
        _free_room(layer)
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = length


def _kept(layer: Any, length: int) -> int:
    """Return how many of `length` columns a layer keeps."""
    return min(length, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else length


def _free_room(layer: Any) -> None:
    if isinstance(layer, GrowingLayer):
        layer.rooms = None
