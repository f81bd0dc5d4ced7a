"""Build OpenAI's response objects from the updates of rows."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minilora_hub.compare.answer import TokenScore, Update
from minilora_hub.errors import ServingError

SMALLEST_LOGPROB = -9999.0
"""Stands for a probability of 0, whose logarithm JSON cannot hold."""

TORN = "\ufffd"


@dataclass
class Shape:
    """What the answers to one request look like.

    Attributes:
        chat: whether they are chat completions.
        model: the model's name, as it was asked for; of ``"auto"`` that of the chosen one.
        token_text: returns the text of a token.
        alternatives: number of most probable tokens for each token; None without logprobs.
        routed_experts: whether the experts of each token are given.
        route: which adapter was chosen for ``"auto"``, and why.
        id: of the response.
        created: time of the response, in seconds.
    """

    chat: bool
    model: str
    token_text: Callable[[int], str]
    alternatives: int | None = None
    routed_experts: bool = False
    route: dict[str, Any] | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def chatty(self) -> bool:
        """Whether updates without text are worth a chunk of a stream."""
        return self.alternatives is not None or self.routed_experts

    def response(self, choices: list[dict[str, Any]], chunk: bool = False, **fields: Any) -> dict[str, Any]:
        """Return a whole response, or a chunk of a stream."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        head = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return head | ({"route": self.route} if self.route else {}) | {"choices": choices} | fields

    def choice(
        self,
        index: int,
        updates: Sequence[Update],
        chunk: bool = False,
        prompt: str = "",
        scores: Sequence[TokenScore] = (),
        offset: int = 0,
    ) -> dict[str, Any]:
        """Return a choice with the text of `updates`.

        Args:
            index: of the choice.
            updates: all of its updates, or for a chunk the next.
            chunk: whether it is a part of a stream.
            prompt: the prompt, where it is echoed.
            scores: scores of the prompt's tokens, where they are echoed.
            offset: characters of the tokens before these, for a completion's logprobs.
        """
        text = prompt + "".join(update.text for update in updates)
        last = updates[-1] if updates else None
        choice: dict[str, Any] = {"index": index}
        if not self.chat:
            choice["text"] = text
        elif chunk:
            choice["delta"] = {"content": text}
        else:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        choice["logprobs"] = None
        if self.alternatives is not None:
            tokens = [*scores, *(_score(update) for update in updates if update.token_id is not None)]
            choice["logprobs"] = self._chat_logprobs(tokens) if self.chat else self._logprobs(tokens, offset)
        choice["finish_reason"] = finish_reason(last) if last is not None and last.finished else None
        if self.routed_experts:
            choice["routed_experts"] = [_experts(update) for update in updates if update.token_id is not None]
        return choice

    def length(self, tokens: Sequence[int]) -> int:
        """Return the number of characters of some tokens."""
        return sum(len(self.token_text(token)) for token in tokens)

    def _chat_logprobs(self, tokens: Sequence[TokenScore]) -> dict[str, Any]:
        content = []
        for score in tokens:
            entry = self._entry(score.token_id, score.logprob)
            best = score.alternatives[: self.alternatives]
            content.append(entry | {"top_logprobs": [self._entry(token, logprob) for token, logprob in best]})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        # A token that ends inside a character has no text of its own.
        return {"token": text, "logprob": number(logprob), "bytes": None if TORN in text else list(text.encode())}

    def _logprobs(self, tokens: Sequence[TokenScore], offset: int) -> dict[str, Any]:
        texts = [self.token_text(score.token_id) for score in tokens]
        best: list[dict[str, float | None] | None] = []
        offsets = []
        for text, score in zip(texts, tokens, strict=True):
            offsets.append(offset)
            offset += len(text)
            if score.logprob is None:
                best.append(None)
                continue
            found: dict[str, float | None] = {}
            for token, logprob in (*score.alternatives[: self.alternatives], (score.token_id, score.logprob)):
                found.setdefault(self.token_text(token), number(logprob))
            best.append(found)
        return {
            "tokens": texts,
            "token_logprobs": [number(score.logprob) for score in tokens],
            "top_logprobs": best,
            "text_offset": offsets,
        }


def _score(update: Update) -> TokenScore:
    assert update.token_id is not None
    return TokenScore(update.token_id, update.logprob, update.alternatives)


def _experts(update: Update) -> dict[str, Any] | None:
    if update.experts is None:
        return None
    return {"experts": update.experts, "weights": update.expert_weights}


def number(logprob: float | None) -> float | None:
    """Return a logprob as JSON can hold it.

    Raises:
        ServingError: it is NaN (500).
    """
    if logprob is None:
        return None
    if math.isnan(logprob):
        raise ServingError(500, "the model's logits contain NaN: its weights or its adapter's are damaged")
    return max(logprob, SMALLEST_LOGPROB)


def finish_reason(update: Update) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "length" if update.reason == "length" else "stop"


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the counts of tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
