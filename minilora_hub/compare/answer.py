"""One row's answer in the making: its tokens, its text, its clock, and when it ends."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from minilora_hub.compare.sampling import Sampling, TokenPicker
from minilora_hub.compare.text_stream import TextStream

Reason = Literal["eos", "length", "stop", "stopped", "error"]

ALTERNATIVES = 5
"""Most probable tokens that an update tells beside the one that was chosen."""


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        prompt: what the model answers.
        adapter: name of a column, None for the bare base.
        sampling: how its tokens are chosen.
        solo_expert: for a MixLoRA, the expert that alone serves this row, with the whole weight; None: the router's.
    """

    prompt: str
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    solo_expert: int | None = None


@dataclass(frozen=True)
class Update:
    """What one step changed in one row.

    Attributes:
        row: index into the rows that were asked for.
        text: text to append; may be empty.
        token_id: the token that was generated, or None if the step generated none.
        tokens: tokens this row has generated so far, an end-of-text token included.
        logprob: natural logarithm of the model's probability of the token, before temperature and penalties.
        alternatives: the most probable tokens at this position, the best first, each with its logprob.
        experts: for a MixLoRA, which experts served the position that predicted this token: per layer, their numbers.
        expert_weights: their weights, in the same order.
        forwards_alone: of the base that this row would have taken so far, had it been answered alone; None if the step
            generated no token.
        seconds_to_first_token: from the start of the stream; None before the first.
        tokens_per_second: since this row's first token.
        milliseconds_per_step: mean computing time of one decode step of the whole batch.
        finished: nothing follows for this row.
        reason: why: the model's own end, the limit, a stop text, the visitor's stop, or an error.
        error: what went wrong, where reason is ``"error"``.
    """

    row: int
    text: str = ""
    token_id: int | None = None
    tokens: int = 0
    logprob: float | None = None
    alternatives: tuple[tuple[int, float], ...] = ()
    experts: tuple[tuple[int, ...], ...] | None = None
    expert_weights: tuple[tuple[float, ...], ...] | None = None
    forwards_alone: int | None = None
    seconds_to_first_token: float | None = None
    tokens_per_second: float | None = None
    milliseconds_per_step: float | None = None
    finished: bool = False
    reason: Reason | None = None
    error: str | None = None


class Answer:
    """The state of one row.

    Args:
        index: of the row.
        row: what was asked.
        ids: its prompt's tokens.
        limit: the most tokens it may generate.
        tokenizer: its model's.
        ends: tokens that end it.

    Attributes:
        ids: (1, tokens so far), on the CPU.
        prompt_tokens: how many of them are the prompt's.
        finished: nothing follows.
    """

    def __init__(
        self,
        index: int,
        row: Row,
        ids: list[int],
        limit: int,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
    ) -> None:
        """Prepare; nothing is computed yet."""
        self.index, self.row = index, row
        self.ids = torch.tensor([ids])
        self.prompt_tokens = len(ids)
        self.finished = False
        self._limit, self._ends = limit, ends
        self._pick = TokenPicker(row.sampling)
        self._text = TextStream(tokenizer, row.sampling.stop)
        self._tokens = 0
        self._started = time.perf_counter()
        self._first_at: float | None = None
        self._decode_seconds = 0.0

    def take(self, logits: torch.Tensor, seconds: float, **fields: Any) -> Update:
        """Choose the next token from `logits` (vocabulary), which a step of `seconds` computed."""
        try:
            token = self._pick(self.ids, logits[None])
            text = self._text.push(token)
        except Exception as error:  # whatever goes wrong here is this row's alone
            return self.end("error", f"{type(error).__name__}: {error}")
        self._tick(seconds)
        self.ids = torch.cat([self.ids, torch.tensor([[token]])], dim=1)
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        best = logprobs.topk(min(ALTERNATIVES, len(logprobs)))
        fields |= {
            "token_id": token,
            "text": text,
            "logprob": float(logprobs[token]),
            "alternatives": tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)),
        }
        if self._text.stopped:
            return self.end("stop", **fields)
        if token in self._ends:
            return self.end("eos", **fields)
        if self._tokens >= self._limit:
            return self.end("length", **fields)
        return self._update(**fields)

    def _tick(self, seconds: float) -> None:
        self._tokens += 1
        if self._first_at is None:
            self._first_at = time.perf_counter()
        else:
            self._decode_seconds += seconds

    def end(self, reason: Reason, error: str | None = None, text: str = "", **fields: Any) -> Update:
        """Finish, and hand out what text was held back."""
        self.finished = True
        if reason != "error":
            text += self._text.finish(complete=reason == "eos")
        return self._update(text=text, finished=True, reason=reason, error=error, **fields)

    def _update(self, **fields: Any) -> Update:
        decoded = self._tokens - 1
        first, rate, step = None, None, None
        if self._first_at is not None:
            first = self._first_at - self._started
            if decoded > 0:
                rate = decoded / (time.perf_counter() - self._first_at)
                step = 1000 * self._decode_seconds / decoded
        return Update(
            self.index,
            tokens=self._tokens,
            seconds_to_first_token=first,
            tokens_per_second=rate,
            milliseconds_per_step=step,
            **fields,
        )
