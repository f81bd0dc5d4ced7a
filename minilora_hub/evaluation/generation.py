"""Greedy answers for a batch of prompts with one adapter of the bank, and what its routers decided meanwhile.

Every prompt of a batch begins alike (the chat template's system turn, examples): what they have in common is read once,
for all rows. Rows that have ended leave the batch. All rows of a batch have the same adapter: the products of an
adapter are then as large as the base's, and what is computed for an adapter does not depend on which others are
measured in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.cached_forward import CachedForward
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.routing import RoutingRecord, record_routing


@dataclass
class RoutingSums:
    """What the routers of some tokens decided, padding excluded; sums of the like can be added.

    Attributes:
        tokens: how many tokens.
        chosen: how often each expert was chosen, [mixtures][experts].
        entropy: sum over the tokens of the entropy of the router's softmax, over ln(experts), [mixtures].
    """

    tokens: int
    chosen: list[list[int]]
    entropy: list[float]

    def __add__(self, other: RoutingSums) -> RoutingSums:
        """Both together."""
        return RoutingSums(
            self.tokens + other.tokens,
            [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(self.chosen, other.chosen, strict=True)],
            [a + b for a, b in zip(self.entropy, other.entropy, strict=True)],
        )


@dataclass(frozen=True)
class Generated:
    """The answers of a batch.

    Attributes:
        tokens: per prompt, what was generated, without the token that ended it.
        routing: for a MixLoRA, over all tokens that the model read: the prompts and the answers but for each one's
            last token; else None.
    """

    tokens: list[list[int]]
    routing: RoutingSums | None


@torch.inference_mode()
def generate(
    bank: AdapterBank,
    adapter: str | None,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Collection[int],
) -> Generated:
    """Answer prompts with the most probable token each time.

    Args:
        bank: the base and its adapters.
        adapter: which one, held by the caller's `bank.use`; None for the bare base.
        prompts: token ids, none empty.
        max_new_tokens: the most tokens of an answer.
        ends: tokens that end an answer.

    Raises:
        AdapterError: the logits hold NaN.
    """
    batch = _Batch(bank, adapter, prompts, max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))
    logits = batch.read_prompts()
    for step in range(max_new_tokens):
        if logits.isnan().any():
            raise AdapterError(f"adapter {adapter!r}: it computes NaN: its weights or the base's are damaged")
        chosen = logits.argmax(dim=-1).tolist()
        kept = []
        for line, token in enumerate(chosen):
            if token not in ends:
                answers[live[line]].append(token)
                kept.append(line)
        if not kept or step == max_new_tokens - 1:
            break
        live = [live[line] for line in kept]
        logits = batch.read_tokens([chosen[line] for line in kept], kept)
    return Generated(answers, batch.routing)


class _Batch:
    """The model's state while a batch is answered: cache, mask, and the routing so far."""

    def __init__(
        self, bank: AdapterBank, adapter: str | None, prompts: Sequence[Sequence[int]], max_new_tokens: int
    ) -> None:
        self._bank, self._adapter, self._prompts = bank, adapter, prompts
        self._model = CachedForward(bank.model)
        longest = max(map(len, prompts)) + max_new_tokens
        self._may_share = longest <= _window(bank.model)
        self.routing: RoutingSums | None = None
        self._mask = torch.zeros(1, 0, dtype=torch.long)

    def read_prompts(self) -> torch.Tensor:
        """Read all prompts; returns the logits after each one's last token, (rows, vocabulary)."""
        count = len(self._prompts)
        shortest = min(map(len, self._prompts))
        # At least one token of each row is read on its own, for its logits.
        common = min(_common(self._prompts), shortest - 1)
        if count > 1 and common > 0 and self._may_share:
            start = torch.tensor([list(self._prompts[0][:common])])
            self._forward(start, torch.ones_like(start), weight=count)
            every = torch.zeros(count, dtype=torch.long)
            self._model.keep_rows(every)
            self._mask = self._mask[every]
        else:
            common = 0
            self._mask = torch.zeros(count, 0, dtype=torch.long)
        longest = max(map(len, self._prompts)) - common
        ids = torch.zeros(count, longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for line, prompt in enumerate(self._prompts):
            rest = list(prompt[common:])
            ids[line, longest - len(rest) :] = torch.tensor(rest)
            mask[line, longest - len(rest) :] = 1
        return self._forward(ids, mask)

    def read_tokens(self, tokens: list[int], lines: list[int]) -> torch.Tensor:
        """Read one more token of each row in `lines`; the other rows leave. Returns their logits."""
        if len(lines) < self._mask.shape[0]:
            kept = torch.tensor(lines)
            self._model.keep_rows(kept)
            self._mask = self._mask[kept]
        ids = torch.tensor(tokens).unsqueeze(1)  # (rows, 1)
        return self._forward(ids, torch.ones_like(ids))

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, weight: int = 1) -> torch.Tensor:
        """Read (rows, seq) new tokens; `mask` is 0 on padding. Each token counts `weight` times in the routing."""
        seen = self._mask.shape[1]
        self._mask = torch.cat([self._mask, mask], dim=1)  # (rows, all tokens so far)
        options: dict[str, Any] = {}
        if not self._mask.all():
            options["attention_mask"] = self._mask.to(self._model.device)
            if self._model.takes_positions:
                positions = (self._mask.cumsum(dim=1) - 1).clamp_min(0)[:, seen:]
                options["position_ids"] = positions.to(self._model.device)
        with (
            self._bank.rows([self._adapter] * ids.shape[0]),
            record_routing() as record,
        ):
            logits = self._model(ids, **options)
        if record.logits:
            sums = routing_sums(record, mask.to(self._model.device), weight)
            self.routing = sums if self.routing is None else self.routing + sums
        return logits.float()


def routing_sums(record: RoutingRecord, mask: torch.Tensor, weight: int = 1) -> RoutingSums:
    """Add up a forward's routing over the tokens of `mask`, (batch, seq), each counted `weight` times."""
    real = mask.bool()
    logits = torch.stack([layer[real] for layer in record.logits]).double()  # (mixtures, tokens, experts)
    selected = torch.stack([layer[real] for layer in record.selected])  # (mixtures, tokens, K), -1 for no expert
    experts = logits.shape[-1]
    chosen = torch.nn.functional.one_hot(selected.flatten(1) + 1, experts + 1).sum(dim=1)[:, 1:]  # (mixtures, experts)
    logarithms = logits.log_softmax(dim=-1)
    entropy = -(logarithms.exp() * logarithms).sum(dim=(-1, -2)) / math.log(max(experts, 2))
    return RoutingSums(
        weight * logits.shape[1],
        (weight * chosen).tolist(),
        [weight * value for value in entropy.tolist()],
    )


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """With how many equal tokens the prompts begin."""
    different = (place for place, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    return next(different, min(map(len, prompts)))


def _window(model: Any) -> float:
    """The most tokens that a row may have before a model with sliding windows forgets the first."""
    config = model.config.get_text_config()
    return getattr(config, "sliding_window", None) or math.inf
