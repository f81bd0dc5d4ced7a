"""Attention over packed rows on a CPU, which transformers' continuous batching computes with one dense mask.

Its manager hands the queries of all rows and the keys of all rows to one call, and a mask hides those of other rows:
the work grows with the square of the number of rows. Kernels that know where a row begins exist for GPUs only. Here
each row's queries meet its own keys, by the same functions of transformers, rows of one length together wherever they
stand (the columns of a comparison are such rows), and forwards that are not packed go to them as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

PREFIX = "minilora_packed_"
"""Begins the names of the attentions here; transformers' name follows."""
KEPT = ("scaling", "s_aux", "softcap")
"""Arguments of an attention that do not depend on the rows."""


Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def packed(find: Callable[[nn.Module], Attention]) -> Attention:
    """Return an attention, of transformers' interface, that computes each packed row with another one.

    Args:
        find: returns the other one for an attention layer.
    """

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the attention of each packed row, or of rows that are not packed as the other one does.

        Args:
            module: the attention layer.
            query: (1, heads, queries of all rows, head size).
            key: (1, key heads, keys of all rows, head size); the last keys of a row are those of its queries.
            value: as `key`.
            attention_mask: None where rows are packed.
            **kwargs: with `cu_seq_lens_q` and `cu_seq_lens_k`, (rows + 1), where rows are packed.

        Returns:
            (1, queries of all rows, heads, head size), and None.
        """
        own = find(module)
        if kwargs.get("cu_seq_lens_q") is None:
            return own(module, query, key, value, attention_mask, **kwargs)
        return _each_row(own, module, query, key, value, kwargs), None

    return attention


ATTENTIONS: dict[str, tuple[Attention, Callable[..., Any]]] = {
    "sdpa": (packed(lambda module: sdpa_attention_forward), sdpa_mask),
    # The one of the model's own file, which differs from others'.
    "eager": (packed(lambda module: sys.modules[type(module).__module__].eager_attention_forward), eager_mask),
}
"""By transformers' names: an attention for packed rows, and what makes the mask of rows that are not packed."""


def _each_row(
    attention: Attention,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kwargs: dict[str, Any],
) -> torch.Tensor:
    options = {name: kwargs[name] for name in KEPT if name in kwargs}
    starts = [kwargs[f"cu_seq_lens_{each}"].tolist() for each in "qk"]
    groups: dict[tuple[int, int], list[int]] = {}
    for row, ((first, stop), (key_first, key_stop)) in enumerate(zip(*map(pairwise, starts), strict=True)):
        groups.setdefault((stop - first, key_stop - key_first), []).append(row)
    found: list[Any] = [None] * (len(starts[0]) - 1)
    for (queries, keys), rows in groups.items():
        mask, window = None, min(kwargs.get("sliding_window") or keys, keys)
        if window < keys or (queries > 1 and (queries < keys or attention is not sdpa_attention_forward)):
            mask = _mask(queries, keys, window, query)  # otherwise all may be looked at, or `sdpa` is causal by itself
        asked = _rows(query, [starts[0][row] for row in rows], queries)
        seen = (_rows(states, [starts[1][row] for row in rows], keys) for states in (key, value))
        answers = attention(module, asked, *seen, mask, **options)[0]
        for row, answer in zip(rows, answers, strict=True):
            found[row] = answer
    return torch.cat(found)[None]


def _rows(states: torch.Tensor, starts: list[int], length: int) -> torch.Tensor:
    """Return (rows, heads, length, size) of rows that are packed in (1, heads, tokens of all, size).

    It is a copy only where the rows are not adjacent.
    """
    first, count = starts[0], len(starts)
    if starts[-1] == first + (count - 1) * length:
        return states[0, :, first : first + count * length].unflatten(1, (count, length)).transpose(0, 1)
    return torch.stack([states[0, :, start : start + length] for start in starts])


def _mask(queries: int, keys: int, window: int, like: torch.Tensor) -> torch.Tensor:
    """Return (1, 1, queries, keys), which is added to the scores; the last query is that of the last key."""
    distance = torch.arange(keys - queries, keys, device=like.device)[:, None] - torch.arange(keys, device=like.device)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, torch.finfo(like.dtype).min)[None, None]


def use_packed_attention(model: Any, name: str) -> None:
    """Let a model on a CPU compute its attention packed.

    Args:
        model: any.
        name: of its attention before; one that is not in `ATTENTIONS` is left as it is.
    """
    if model.device.type != "cpu" or name not in ATTENTIONS:
        return
    attention, mask = ATTENTIONS[name]
    AttentionInterface.register(PREFIX + name, attention)
    AttentionMaskInterface.register(PREFIX + name, mask)
    model.set_attn_implementation(PREFIX + name)
