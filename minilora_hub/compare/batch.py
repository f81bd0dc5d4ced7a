"""Answer rows with different adapters together, with one forward of the base per step."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Update
from minilora_hub.compare.banked_layers import Group
from minilora_hub.compare.decoding import DecodingBatch
from minilora_hub.remote_code.routing_record import Routes

PREFILL_TOKENS = 512
"""Maximum prompt tokens of all rows per forward: long prompts are prefilled in chunks, so that Stop also works then."""

PREFILL_LEAST = 16
"""Minimum chunk length of each prompt."""


class Batch:
    """The answers of a batch: each step generates a token for every row, and finished rows leave the batch.

    Args:
        bank: the models; the caller holds the adapters of all rows with `bank.use`.
        answers: the rows.
    """

    def __init__(self, bank: AdapterBank, answers: Sequence[Answer]) -> None:
        """Order the rows, without computing anything."""
        self._bank = bank
        self._live = sorted(answers, key=lambda answer: _order(bank, answer))
        adapters = [answer.row.adapter for answer in self._live]
        self._decoding = DecodingBatch(bank, adapters, [answer.row.solo_expert for answer in self._live])
        self._decoding.append([answer.ids[0].tolist() for answer in self._live])

    @property
    def finished(self) -> bool:
        """Whether no row is left."""
        return not self._live

    @property
    def answers(self) -> list[Answer]:
        """The answers that have not ended."""
        return [*self._live]

    @property
    def cache_bytes(self) -> int:
        """Size of the key/value cache."""
        return self._decoding.cache_bytes

    @property
    def joinable(self) -> bool:
        """Whether `join` can add rows to this batch or add it to another, now that its prompts are read."""
        return self._decoding.joinable

    def join(self, other: Batch) -> None:
        """Move the rows of another batch into this one. Both are `joinable` and have read their prompts."""
        self._decoding.join(other._decoding)
        joined = [*self._live, *other._live]
        order = sorted(range(len(joined)), key=lambda row: _order(self._bank, joined[row]))
        if order != [*range(len(joined))]:
            self._decoding.keep_rows(order)
        self._live, other._live = [joined[row] for row in order], []

    def drop(self, answers: Collection[Answer]) -> None:
        """Remove rows whose answers nobody waits for."""
        self._keep([answer not in answers for answer in self._live])

    def halt(self, rows: Collection[int]) -> list[Update]:
        """End the rows of these indices that have not ended."""
        halted = [answer for answer in self._live if answer.index in rows]
        if halted:
            self.drop(halted)
        return [answer.end("stopped") for answer in halted]

    def _keep(self, keep: Sequence[bool]) -> None:
        kept = [row for row, wanted in enumerate(keep) if wanted]
        if len(kept) < len(self._live):
            self._live = [self._live[row] for row in kept]
            self._decoding.keep_rows(kept)
            if kept and not self._decoding.mask.all():
                self._decoding.remove_padding()

    def end(self, reason: Any, error: str | None = None) -> list[Update]:
        """End every row and free the cache."""
        ended = sorted((answer.end(reason, error) for answer in self._live), key=lambda update: update.row)
        self._live = []
        self._decoding.keep_rows([])
        return ended

    def step(self) -> list[Update]:
        """Run one forward of all rows and return the updates; none while the prompts are prefilled."""
        began = time.perf_counter()
        try:
            scored = [row for row, answer in enumerate(self._live) if answer.scoring]
            logits = self._decoding.read(max(PREFILL_LEAST, PREFILL_TOKENS // len(self._live)), every=bool(scored))
            if scored:
                read = self._decoding.mask.shape[1] - self._decoding.unread
                for row in scored:
                    padding = self._decoding.mask.shape[1] - self._live[row].prompt_tokens
                    self._live[row].score_prompt(read - logits.shape[1] - padding, logits[row])
                logits = logits[:, -1]
            if self._decoding.unread:
                return []
            experts = _experts_of_last_position(self._decoding.routing)
            logits = logits.to("cpu")  # (rows, vocabulary)
        except Exception as error:  # it cannot be attributed to one row
            return self.end("error", f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        updates = [
            answer.take(logits[row], seconds, forwards_alone=_forwards_alone(answer), **experts.get(row, {}))
            for row, answer in enumerate(self._live)
        ]
        self._keep([not answer.finished for answer in self._live])
        if self._live:
            self._decoding.append([answer.ids[0, -1:].tolist() for answer in self._live])
        return sorted(updates, key=lambda update: update.row)


def _order(bank: AdapterBank, answer: Answer) -> tuple:
    """Return a sort key that groups rows: the bare base, adapters on linears only, mixtures and their solo experts."""
    name, solo = answer.row.adapter, answer.row.solo_expert
    entry = None if name is None else bank.find(name)
    return entry is not None and entry.facts.experts > 0, name or "", -1 if solo is None else solo


def _forwards_alone(answer: Answer) -> int:
    """Count the forward passes that the row alone would have needed to compute its next token."""
    return -(-answer.prompt_tokens // PREFILL_TOKENS) + answer.ids.shape[1] - answer.prompt_tokens


def _experts_of_last_position(routing: Mapping[Group, Sequence[Routes]]) -> dict[int, dict[str, Any]]:
    """Return {row of the batch: fields of its update} for the rows of MixLoRA adapters."""
    fields: dict[int, dict[str, Any]] = {}
    for group, layers in routing.items():
        count = group.stop - group.start
        # Each (rows * seq, K) -> the last position of each row, (rows, K); all layers in one transfer.
        selected, weights = (
            torch.stack([part.view(count, -1, part.shape[-1])[:, -1] for part in parts], dim=1).tolist()
            for parts in ([layer.selected for layer in layers], [layer.weights for layer in layers])
        )  # each (rows, layers, K)
        for row, (experts, shares) in enumerate(zip(selected, weights, strict=True), start=group.start):
            served = [
                [(expert, share) for expert, share in zip(*layer, strict=True) if share > 0]  # 0: an unused slot
                for layer in zip(experts, shares, strict=True)
            ]
            fields[row] = {
                "experts": tuple(tuple(expert for expert, _ in layer) for layer in served),
                "expert_weights": tuple(tuple(share for _, share in layer) for layer in served),
            }
    return fields
