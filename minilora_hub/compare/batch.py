"""Answer rows with different adapters together, with one forward of the base per step."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Reason, Update
from minilora_hub.compare.banked_layers import Routing
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

    def end(
        self, indices: Collection[int] | None = None, reason: Reason = "stopped", error: str | None = None
    ) -> list[Update]:
        """End the rows of these indices as far as they have not ended, or all, and free their cache."""
        gone = [answer for answer in self._live if indices is None or answer.index in indices]
        self._keep([answer not in gone for answer in self._live])
        return _by_row(answer.end(reason, error) for answer in gone)

    def _keep(self, keep: Sequence[bool]) -> None:
        kept = [row for row, wanted in enumerate(keep) if wanted]
        if len(kept) < len(self._live):
            self._live = [self._live[row] for row in kept]
            self._decoding.keep_rows(kept)

    def step(self) -> list[Update]:
        """Run one forward of all rows and return the updates; none while the prompts are prefilled."""
        began = time.perf_counter()
        try:
            unread = self._decoding.unread
            logits = self._decoding.read(max(PREFILL_LEAST, PREFILL_TOKENS // len(self._live)))
            if self._decoding.unread:
                return []
            # The groups of the routing are of rows, which have as many tokens each in a forward.
            routing = {
                group._replace(start=group.start * unread, stop=group.stop * unread): layers
                for group, layers in self._decoding.routing.items()
            }
            experts = experts_at(routing, [(row + 1) * unread - 1 for row in range(len(self._live))])
            logits = logits.to("cpu")  # (rows, vocabulary)
        except Exception as error:  # it cannot be attributed to one row
            return self.end(None, "error", f"{type(error).__name__}: {error}")
        seconds = time.perf_counter() - began
        updates = _by_row(
            answer.take(logits[row], seconds, forwards_alone=forwards_alone(answer), **experts.get(row, {}))
            for row, answer in enumerate(self._live)
        )
        self._keep([not answer.finished for answer in self._live])
        if self._live:
            self._decoding.append([answer.ids[0, -1:].tolist() for answer in self._live])
        return updates


def _order(bank: AdapterBank, answer: Answer) -> tuple:
    """Return a sort key that groups rows: the bare base, adapters on linears only, mixtures and their solo experts."""
    name, solo = answer.row.adapter, answer.row.solo_expert
    entry = None if name is None else bank.find(name)
    return entry is not None and entry.facts.experts > 0, name or "", -1 if solo is None else solo


def _by_row(updates: Iterable[Update]) -> list[Update]:
    return sorted(updates, key=lambda update: update.row)


def forwards_alone(answer: Answer) -> int:
    """Count the forward passes that the row alone would have needed to compute its next token."""
    return -(-answer.prompt_tokens // PREFILL_TOKENS) + answer.ids.shape[1] - answer.prompt_tokens


def experts_at(routing: Routing, places: Sequence[int]) -> dict[int, dict[str, Any]]:
    """Return {index in `places`: fields of an update} for the tokens of MixLoRA adapters.

    Where the linears of a layer have routers of their own, an expert's weight in the layer is its mean over them.

    Args:
        routing: of a forward, with groups of tokens.
        places: positions of tokens in it.
    """
    fields: dict[int, dict[str, Any]] = {}
    for group, layers in routing.items():
        mine = [index for index, place in enumerate(places) if group.start <= place < group.stop]
        if not mine:
            continue
        found = [_of_layer(routes, [places[index] - group.start for index in mine]) for routes in layers.values()]
        width = max(weights.shape[-1] for weights, _ in found)
        # All layers in one transfer, each (places, layers, K); an unused slot has the weight 0.
        weights, selected = (
            torch.stack([functional.pad(part, (0, width - part.shape[-1])) for part in parts], dim=1).tolist()
            for parts in zip(*found, strict=True)
        )
        for index, experts, shares in zip(mine, selected, weights, strict=True):
            served = [_served(*layer) for layer in zip(experts, shares, strict=True)]
            fields[index] = {
                "experts": tuple(tuple(layer) for layer in served),
                "expert_weights": tuple(tuple(layer.values()) for layer in served),
            }
    return fields


def _of_layer(routes: Sequence[Routes], places: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slots of a layer's routers at these places, (places, K): share in the mean, and expert."""
    at = torch.tensor(places, device=routes[0].selected.device)
    weights = torch.cat([one.weights[at] for one in routes], dim=-1) / len(routes)
    return weights, torch.cat([one.selected[at] for one in routes], dim=-1)


def _served(experts: Sequence[int], shares: Sequence[float]) -> dict[int, float]:
    """Return {expert: weight} of one token in one layer, the largest first, without unused slots, whose share is 0."""
    total: dict[int, float] = {}
    for expert, share in zip(experts, shares, strict=True):
        if share > 0:
            total[expert] = total.get(expert, 0.0) + share
    return dict(sorted(total.items(), key=lambda one: -one[1]))
