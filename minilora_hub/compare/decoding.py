"""Decode rows in one batch, with a key/value cache, left padding, chunked prefill, and removal of finished rows.

Used by the comparison and the evaluation. It computes logits; the caller chooses the tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.banked_layers import Routing
from minilora_hub.compare.cache_rows import reserve_room


class CachedForward:
    """Forward passes of a causal model that continue a key/value cache.

    transformers 5.24 renamed the argument and the output ``past_key_values`` to ``cache`` and warns about the old name.

    Attributes:
        cache: the key/value cache after the last forward; None before the first.
        takes_positions: whether the model takes `position_ids`.
        device: the device of the model.
    """

    def __init__(self, model: Any) -> None:
        """Read the model's signature."""
        self._model = model
        known = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in known else "past_key_values"
        # The head takes a fifth of a small model's time, so compute only the logits that are used.
        self._one = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        self.takes_positions = "position_ids" in known
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.cache: Any = None

    def __call__(self, ids: torch.Tensor, every: bool = False, **arguments: Any) -> torch.Tensor:
        """Process (rows, seq) tokens that follow the cache; return logits.

        Args:
            ids: token ids.
            every: whether to return the logits after every token, (rows, seq, vocabulary), instead of those after each
                row's last, (rows, vocabulary).
            **arguments: further arguments of the model's forward, e.g. `attention_mask`.
        """
        arguments |= {self._cache_name: self.cache} | ({} if every else self._one)
        output = self._model(input_ids=ids.to(self.device), use_cache=True, return_dict=True, **arguments)
        if self.cache is None:  # the model has made it
            reserve_room(getattr(output, self._cache_name))
        self.cache = getattr(output, self._cache_name)
        return output.logits if every else output.logits[:, -1]


class DecodingBatch:
    """Rows with a common key/value cache, each with its own adapter.

    Args:
        bank: the base and its adapters. The caller holds those of the rows with `bank.use`.
        adapters: the adapter of each row; None for the bare base.
        solos: see `AdapterBank.rows`.

    Attributes:
        routing: routing of the last forward, as in `BatchRows`.
        mask: (rows, all tokens), 0 on padding.
    """

    def __init__(
        self, bank: AdapterBank, adapters: Sequence[str | None], solos: Sequence[int | None] | None = None
    ) -> None:
        """Start with no tokens."""
        self._bank = bank
        self._rows = list(zip(adapters, solos or [None] * len(adapters), strict=True))
        self._forward = CachedForward(bank.model)
        self._unread = self.mask = torch.zeros(len(self._rows), 0, dtype=torch.long)
        self.routing: Routing = {}

    @property
    def unread(self) -> int:
        """Number of tokens per row, including padding, that were not processed yet."""
        return self._unread.shape[1]

    def append(self, tokens: Sequence[Sequence[int]]) -> None:
        """Append tokens to each row; shorter lists are padded on the left."""
        longest = max(map(len, tokens))
        ids = torch.zeros(len(tokens), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, new in enumerate(tokens):
            ids[row, longest - len(new) :] = torch.tensor(new)
            mask[row, longest - len(new) :] = 1
        self._unread = torch.cat([self._unread, ids], dim=1)
        self.mask = torch.cat([self.mask, mask], dim=1)

    @torch.inference_mode()
    def read(self, most: int | None = None, every: bool = False) -> torch.Tensor:
        """Run one forward over the next `most` tokens of every row, or over all unread tokens.

        Args:
            most: number of tokens; None: all.
            every: see `CachedForward`.

        Returns:
            Logits after the last processed token, (rows, vocabulary); with `every`, after each processed token.
        """
        read = self.mask.shape[1] - self.unread
        most = most or self.unread
        piece, self._unread = self._unread[:, :most], self._unread[:, most:]
        mask = self.mask[:, : read + piece.shape[1]].to(self._forward.device)
        options = {}
        if not self.mask.all():
            options["attention_mask"] = mask
            if self._forward.takes_positions:
                options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, read:]
        adapters, solos = zip(*self._rows, strict=True)
        with self._bank.rows(adapters, solos) as rows:
            logits = self._forward(piece, every, **options)
            self.routing = rows.routing
        return logits

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; an index may be repeated. With an empty list, the cache is freed."""
        if not rows:
            self._forward.cache = None
            return
        kept = torch.tensor(rows)
        self._rows = [self._rows[row] for row in rows]
        self._unread, self.mask = self._unread[kept], self.mask[kept]
        if self._forward.cache is not None:
            self._forward.cache.batch_select_indices(kept.to(self._forward.device))
