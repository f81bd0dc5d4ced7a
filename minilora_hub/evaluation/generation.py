"""Generate greedy answers to a batch of prompts with one adapter of the bank, and accumulate routing statistics.

All rows of a batch have the same adapter, so the answers do not depend on which other adapters are measured in the
same run. The common prefix of the prompts (the chat template's system turn, few-shot examples) is processed once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.decoding import DecodingBatch
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.routing_record import RoutingRecord, record_routing


@dataclass
class RoutingSums:
    """Sums over tokens of the routing decisions of an adapter, excluding padding.

    Attributes:
        tokens: number of tokens.
        chosen: how often each expert was chosen, [layers][experts].
        entropy: sum over the tokens of the entropy of the router's softmax, divided by ln(experts), [layers]. Where the
            linears of a layer have routers of their own, the mean over them; `chosen` is their sum.
    """

    tokens: int
    chosen: list[list[int]]
    entropy: list[float]

    def __add__(self, other: RoutingSums) -> RoutingSums:
        """Add the sums over other tokens."""
        return RoutingSums(
            self.tokens + other.tokens,
            [[a + b for a, b in zip(*layers, strict=True)] for layers in zip(self.chosen, other.chosen, strict=True)],
            [a + b for a, b in zip(self.entropy, other.entropy, strict=True)],
        )


def total(sums: Sequence[RoutingSums]) -> RoutingSums | None:
    """Add sums up; None where there are none."""
    return sum(sums[1:], start=sums[0]) if sums else None


@dataclass(frozen=True)
class Generated:
    """The answers of a batch.

    Attributes:
        tokens: for each prompt, the generated tokens without the end token.
        routing: for a MixLoRA, over all input tokens: the prompts, and the answers without their last token. Else
            None.
    """

    tokens: list[list[int]]
    routing: RoutingSums | None


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
        adapter: its name, held by the caller's `bank.use`; None for the bare base.
        prompts: token ids, none empty.
        max_new_tokens: maximum tokens of an answer.
        ends: tokens that end an answer.

    Raises:
        AdapterError: the logits contain NaN.
    """
    routing: list[RoutingSums] = []
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))

    # At least one token of each row is read on its own, for its logits.
    common = min(_common(prompts), min(map(len, prompts)) - 1)
    if len(prompts) > 1 and common > 0 and max(map(len, prompts)) + max_new_tokens <= _window(bank):
        batch = DecodingBatch(bank, [adapter])
        batch.append([prompts[0][:common]])
        _read(batch, routing, count=len(prompts))
        batch.keep_rows([0] * len(prompts))
    else:
        common = 0
        batch = DecodingBatch(bank, [adapter] * len(prompts))
    batch.append([prompt[common:] for prompt in prompts])
    for step in range(max_new_tokens):
        logits = _read(batch, routing)
        if logits.isnan().any():
            raise AdapterError(f"adapter {adapter!r}: it computes NaN: its weights or the base's are damaged")
        chosen = logits.argmax(dim=-1).tolist()
        kept = [row for row, token in enumerate(chosen) if token not in ends]
        for row in kept:
            answers[live[row]].append(chosen[row])
        if not kept or step == max_new_tokens - 1:
            break
        if len(kept) < len(live):
            live = [live[row] for row in kept]
            batch.keep_rows(kept)
        batch.append([[chosen[row]] for row in kept])
    return Generated(answers, total(routing))


def _read(batch: DecodingBatch, routing: list[RoutingSums], count: int = 1) -> torch.Tensor:
    """Run one forward over all unread tokens, each of which counts `count` times in the routing; return the logits."""
    mask = batch.mask[:, batch.mask.shape[1] - batch.unread :]
    with record_routing() as record:
        logits = batch.read()
    if record.logits:
        routing.append(routing_sums(record, mask.to(logits.device), count))
    return logits.float()


@torch.inference_mode()
def routing_sums(record: RoutingRecord, mask: torch.Tensor, count: int = 1) -> RoutingSums:
    """Add up a forward's routing over the tokens of `mask`, (batch, seq), each of which counts `count` times."""
    real = mask.bool()
    chosen: dict[str, torch.Tensor] = {}
    entropies: dict[str, list[torch.Tensor]] = {}
    for layer, scores, indices in zip(record.layers, record.logits, record.selected, strict=True):
        logits, selected = scores[real].double(), indices[real]  # (tokens, experts), (tokens, K) with -1 for no expert
        experts = logits.shape[-1]
        counts = torch.nn.functional.one_hot(selected.flatten() + 1, experts + 1).sum(dim=0)[1:]  # (experts)
        chosen[layer] = counts + chosen[layer] if layer in chosen else counts
        logarithms = logits.log_softmax(dim=-1)
        entropy = -(logarithms.exp() * logarithms).sum() / math.log(max(experts, 2))
        entropies.setdefault(layer, []).append(entropy)
    means = [count * float(sum(of_layer) / len(of_layer)) for of_layer in entropies.values()]
    return RoutingSums(count * int(real.sum()), [(count * counts).tolist() for counts in chosen.values()], means)


def _common(prompts: Sequence[Sequence[int]]) -> int:
    """Return the length of the prompts' common prefix."""
    columns = enumerate(zip(*prompts, strict=False))
    return next((place for place, tokens in columns if len(set(tokens)) > 1), min(map(len, prompts)))


def _window(bank: AdapterBank) -> float:
    """Return the size of the model's sliding window in tokens; infinite if it has none."""
    config: Any = bank.model.config
    return getattr(config.get_text_config(), "sliding_window", None) or math.inf
