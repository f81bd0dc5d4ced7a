"""Rows that are answered together: one forward of the base a step, whatever adapter each row has."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Update
from minilora_hub.compare.banked_layers import BatchRows
from minilora_hub.compare.cached_forward import CachedForward

PREFILL_TOKENS = 512
"""Prompt tokens of all rows in one forward: long prompts are read in pieces, so that Stop works while they are read."""

PREFILL_LEAST = 16
"""The shortest piece of each prompt."""


class Batch:
    """Rows with a common key/value cache. Shorter prompts are padded on the left; a row that ends leaves the batch.

    Args:
        bank: the models; the adapters of all rows are held by the caller.
        answers: the rows.
    """

    def __init__(self, bank: AdapterBank, answers: Sequence[Answer]) -> None:
        """Arrange the rows; nothing is computed yet."""
        self._bank = bank
        self._live = sorted(answers, key=lambda answer: _order(bank, answer))
        longest = max(answer.ids.shape[1] for answer in answers)
        self._unread = torch.zeros(len(answers), longest, dtype=torch.long)  # (rows, tokens the model has not seen)
        self._mask = torch.zeros_like(self._unread)  # (rows, all tokens), 0 on padding
        for line, answer in enumerate(self._live):
            length = answer.ids.shape[1]
            self._unread[line, longest - length :] = answer.ids[0]
            self._mask[line, longest - length :] = 1
        self._read = 0
        self._model = CachedForward(bank.model)

    @property
    def finished(self) -> bool:
        """Whether no row is left."""
        return not self._live

    def end(self, reason: Any, error: str | None = None) -> list[Update]:
        """End every row, and give the cache back."""
        ended = sorted((answer.end(reason, error) for answer in self._live), key=lambda update: update.row)
        self._live, self._model.cache = [], None
        return ended

    def step(self) -> list[Update]:
        """Run one forward of all rows. While the prompts are still being read, it updates nothing."""
        began = time.perf_counter()
        try:
            adapters = [answer.row.adapter for answer in self._live]
            with self._bank.rows(adapters, [answer.row.solo_expert for answer in self._live]) as rows:
                logits = self._forward()
                if self._unread.shape[1]:
                    return []
                experts = _experts_of_last_position(rows)
            logits = logits.to("cpu")  # (rows, vocabulary)
        except Exception as error:  # nothing tells whose fault it is
            return self.end("error", f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        updates = [
            answer.take(logits[line], seconds, forwards_alone=_forwards_alone(answer), **experts.get(line, {}))
            for line, answer in enumerate(self._live)
        ]
        self._drop_finished()
        if self._live:
            self._unread = torch.stack([answer.ids[0, -1:] for answer in self._live])
            self._mask = torch.cat([self._mask, torch.ones(len(self._live), 1, dtype=torch.long)], dim=1)
        return sorted(updates, key=lambda update: update.row)

    @torch.inference_mode()
    def _forward(self) -> torch.Tensor:
        width = max(PREFILL_LEAST, PREFILL_TOKENS // len(self._live))
        chunk, self._unread = self._unread[:, :width], self._unread[:, width:]
        seen = self._read + chunk.shape[1]
        options: dict[str, Any] = {}
        if not self._mask.all():
            mask = self._mask[:, :seen].to(self._model.device)
            options["attention_mask"] = mask
            if self._model.takes_positions:
                options["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)[:, self._read :]
        logits = self._model(chunk, **options)
        self._read = seen
        return logits

    def _drop_finished(self) -> None:
        kept = [line for line, answer in enumerate(self._live) if not answer.finished]
        if len(kept) == len(self._live):
            return
        self._live = [self._live[line] for line in kept]
        if kept:
            lines = torch.tensor(kept)
            self._model.keep_rows(lines)
            self._mask = self._mask[lines]
        else:
            self._model.cache = None


def _order(bank: AdapterBank, answer: Answer) -> tuple:
    solo = answer.row.solo_expert
    return *bank.order(answer.row.adapter), -1 if solo is None else solo


def _forwards_alone(answer: Answer) -> int:
    """Count the forwards that a row alone would have taken up to the token that it is about to get."""
    return -(-answer.prompt_tokens // PREFILL_TOKENS) + answer.ids.shape[1] - answer.prompt_tokens


def _experts_of_last_position(rows: BatchRows) -> dict[int, dict[str, Any]]:
    """{line of the batch: fields of its update} for the rows of MixLoRA adapters."""
    fields: dict[int, dict[str, Any]] = {}
    for group in rows.groups:
        start, stop = group.start, group.stop
        layers = rows.routing.get(group)
        if not layers:
            continue

        # Each (rows * seq, K) -> the last position of each row, (rows, K); all layers in one transfer.
        def last(part: torch.Tensor, lines: int = stop - start) -> torch.Tensor:
            return part.view(lines, -1, part.shape[-1])[:, -1]

        selected = torch.stack([last(layer.selected) for layer in layers], dim=1).tolist()  # (rows, layers, K)
        weights = torch.stack([last(layer.weights) for layer in layers], dim=1).tolist()
        for line, (experts, shares) in enumerate(zip(selected, weights, strict=True), start=start):
            served = [
                [(expert, share) for expert, share in zip(*layer, strict=True) if share > 0]  # 0: a slot not needed
                for layer in zip(experts, shares, strict=True)
            ]
            fields[line] = {
                "experts": tuple(tuple(expert for expert, _ in layer) for layer in served),
                "expert_weights": tuple(tuple(share for _, share in layer) for layer in served),
            }
    return fields
