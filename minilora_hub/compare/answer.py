"""Rows of a comparison, and the state of each row's answer: tokens, text, times, and stop reason."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from minilora_hub.adapter_folder.folders import Kind
from minilora_hub.compare.sampling import Sampling, TokenPicker
from minilora_hub.compare.text_stream import TextStream

Reason = Literal["eos", "length", "stop", "stopped", "error"]

Turns = tuple[tuple[str, str], ...]
"""Messages of a conversation: (role, text) each."""

ALTERNATIVES = 5
"""Number of most probable tokens in an update, in addition to the chosen one."""


class TokenScore(NamedTuple):
    """A token of a prompt: its id, its logprob, and the most probable tokens there; None and () for the first token."""

    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Row:
    """One row of a batch.

    Attributes:
        prompt: the user's text.
        adapter: name of an adapter, None for the bare base.
        sampling: how its tokens are chosen.
        solo_expert: for a MixLoRA, the only expert that serves this row, with weight 1. None: the router chooses.
        before: the conversation before the prompt: (role, text) of each message, the system's first if there is one.
    """

    prompt: str
    adapter: str | None = None
    sampling: Sampling = field(default_factory=Sampling)
    solo_expert: int | None = None
    before: Turns = ()


@dataclass(frozen=True)
class Column:
    """One model of a comparison: the base, or an adapter on it.

    Attributes:
        name: display name; for an adapter also its name in the bank.
        kind: the method.
        parameters_added: parameters the adapter adds to the base; 0 for the base itself.
        detail: a short description, e.g. ``"rank 16, 8 experts, 2 active"``, with differences from the base in prompts
            and end tokens.
        experts: number of experts of each of its routers, the most where layers differ; 0 if it has none.
        experts_by_layer: the number of each layer; empty where it is the same in all.
        solo_expert: the only expert that serves this column. None: the router chooses.
    """

    name: str
    kind: Kind
    parameters_added: int = 0
    detail: str = ""
    experts: int = 0
    experts_by_layer: tuple[int, ...] = ()
    solo_expert: int | None = None

    @property
    def solo_choices(self) -> int:
        """How many of its experts can serve a column alone: those that every layer has."""
        return min(self.experts_by_layer, default=self.experts)

    @property
    def adapter(self) -> str | None:
        """The `adapter` of its rows."""
        return None if self.kind == "base" else self.name

    def row(self, prompt: str, sampling: Sampling, before: Turns = ()) -> Row:
        """Return a row for this column."""
        return Row(prompt, self.adapter, sampling, self.solo_expert, before)

    def alone(self, expert: int) -> Column:
        """Return a column in which one expert of this adapter serves all tokens."""
        return replace(self, solo_expert=expert)


@dataclass(frozen=True)
class Update:
    """The changes of one step in one row.

    Attributes:
        row: index of the row.
        text: text to append; may be empty.
        token_id: the token that was generated, or None if the step generated none.
        tokens: number of tokens this row has generated so far, including an end-of-text token.
        logprob: natural logarithm of the model's probability of the token, before temperature and penalties.
        alternatives: the most probable tokens at this position, the best first, each with its logprob.
        experts: for a MixLoRA, the experts per layer at the position that predicted this token.
        expert_weights: their weights, in the same order.
        forwards_alone: forward passes of the base that this row alone would have needed so far; None if the step
            generated no token.
        seconds_to_first_token: from the start of the stream; None before the first.
        tokens_per_second: since this row's first token.
        milliseconds_per_step: mean computing time of one decode step of the whole batch.
        finished: whether this is the row's last update.
        reason: why it finished: an end token, the limit, a stop text, the caller's stop, or an error.
        error: the message, where reason is ``"error"``.
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


class Step(NamedTuple):
    """A step of the rows of a stream.

    Attributes:
        forwards: forward passes of the base that it took, 0 or 1.
        updates: those of its rows.
    """

    forwards: int
    updates: list[Update]


class Answer:
    """The state of one row.

    Args:
        index: index of the row.
        row: the row.
        ids: tokens of its prompt.
        limit: maximum number of tokens to generate.
        tokenizer: tokenizer of its model.
        ends: ids of the tokens that end it.
        alternatives: number of most probable tokens in each update.
        score_prompt: whether the tokens of the prompt are scored as well.

    Attributes:
        ids: (1, tokens so far), on the CPU.
        limit: maximum number of tokens to generate.
        prompt_tokens: number of tokens of the prompt.
        prompt_scores: the scores of the prompt's tokens so far, if they are asked for.
        finished: whether it has ended.
    """

    def __init__(
        self,
        index: int,
        row: Row,
        ids: list[int],
        limit: int,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        alternatives: int = ALTERNATIVES,
        score_prompt: bool = False,
    ) -> None:
        """Prepare the state, without computing anything."""
        self.index, self.row = index, row
        self.ids = torch.tensor([ids])
        self.prompt_tokens = len(ids)
        self.prompt_scores = [TokenScore(ids[0], None, ())] if score_prompt else []
        self._alternatives = alternatives
        self.finished = False
        self.limit, self._ends = limit, {*ends, *_special_ids(tokenizer, row.sampling.stop)}
        self._pick = TokenPicker(row.sampling)
        self._text = TextStream(tokenizer, row.sampling.stop)
        self._tokens = 0
        self._started = time.perf_counter()
        self._first_at: float | None = None
        self._decode_seconds = 0.0

    def take(self, logits: torch.Tensor, seconds: float, **fields: Any) -> Update:
        """Choose the next token from `logits` (vocabulary), which a step of `seconds` computed."""
        if self.limit <= 0:  # only its prompt is scored
            return self.end("length")
        try:
            token = self._pick(self.ids, logits[None])
            text = self._text.push(token)
        except Exception as error:  # an error here affects only this row
            return self.end("error", f"{type(error).__name__}: {error}")
        self._tick(seconds)
        self.ids = torch.cat([self.ids, torch.tensor([[token]])], dim=1)
        score = _scores(logits[None], [token], self._alternatives)[0]
        fields |= {"token_id": token, "text": text, "logprob": score.logprob, "alternatives": score.alternatives}
        if self._text.stopped:
            return self.end("stop", **fields)
        if token in self._ends:
            return self.end("eos", **fields)
        if self._tokens >= self.limit:
            return self.end("length", **fields)
        return self._update(**fields)

    @property
    def scoring(self) -> bool:
        """Whether tokens of the prompt are still to be scored."""
        return 0 < len(self.prompt_scores) < self.prompt_tokens

    def score_prompt(self, first: int, logits: torch.Tensor) -> None:
        """Score tokens of the prompt.

        Args:
            first: position in the prompt of the token after which `logits` begin.
            logits: (tokens, vocabulary).
        """
        targets = self.ids[0, first + 1 : min(first + 1 + len(logits), self.prompt_tokens)].tolist()
        self.prompt_scores += _scores(logits[: len(targets)], targets, self._alternatives)

    def _tick(self, seconds: float) -> None:
        self._tokens += 1
        if self._first_at is None:
            self._first_at = time.perf_counter()
        else:
            self._decode_seconds += seconds

    def end(self, reason: Reason, error: str | None = None, text: str = "", **fields: Any) -> Update:
        """Finish, and return the buffered text."""
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


def _special_ids(tokenizer: PreTrainedTokenizerBase, stop: Collection[str]) -> list[int]:
    """Return the ids of the stop texts that are special tokens, which are never part of an answer's text."""
    known = getattr(tokenizer, "added_tokens_decoder", {}) if stop else {}
    return [number for number, token in known.items() if token.special and token.content in stop]


def _scores(logits: torch.Tensor, tokens: list[int], alternatives: int) -> list[TokenScore]:
    """Return the score of each token, from logits of (tokens, vocabulary)."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    best = logprobs.topk(min(alternatives, logprobs.shape[-1]), dim=-1)
    chosen = logprobs.gather(-1, torch.tensor(tokens, dtype=torch.long, device=logprobs.device)[:, None])[:, 0]
    return [
        TokenScore(token, logprob, tuple(zip(ids, values, strict=True)))
        for token, logprob, ids, values in zip(
            tokens, chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
