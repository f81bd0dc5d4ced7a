"""Choose the next token: checked settings, and transformers' own logits processors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minilora_hub.seeds import require_seed

PENALTIES: Final = (0.01, 10.0)
"""Least and largest repetition penalty: beyond them scores may not fit float32."""


@dataclass(frozen=True)
class Sampling:
    """Settings for choosing one row's tokens, and for ending its answer.

    Args:
        max_new_tokens: maximum number of tokens to generate, at least 1.
        temperature: 0 takes the most probable token (greedy); above 0 samples.
        top_p: when sampling, keep the most probable tokens that together reach this probability, in (0, 1].
        top_k: when sampling, keep this many of the most probable tokens; 0 keeps all. Below 2**63, as the seed.
        repetition_penalty: divides the positive scores of tokens already in the text, and multiplies the negative ones;
            1 has no effect. From 0.01 to 10.
        seed: seed of each row's own random generator, at least 0.
        stop: an answer ends before the first of these strings, which is not shown.

    Raises:
        ValueError: a setting is out of range; the message names it, the value received and what is required.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        _require(_is_int(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "an integer of at least 1")
        _require(_is_number(self.temperature), "temperature", self.temperature, "a number of at least 0")
        _require(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "a number above 0, at most 1")
        need = "an integer from 0 to 2**63 - 1 (0 keeps all tokens)"
        _require(_is_int(self.top_k, 0) and self.top_k < 2**63, "top_k", self.top_k, need)
        least, most = PENALTIES
        penalty, need = self.repetition_penalty, f"a number from {least:g} to {most:g} (1 changes nothing)"
        _require(_is_number(penalty) and least <= penalty <= most, "repetition_penalty", penalty, need)
        require_seed(self.seed)
        _require(isinstance(self.stop, tuple), "stop", self.stop, "a tuple of texts")
        for text in self.stop:
            _require(isinstance(text, str) and text, "stop", text, "a text that is not empty")


def _require(ok: object, argument: str, value: object, need: str) -> None:
    if not ok:
        raise ValueError(f"{argument}={value!r}: must be {need}")


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


ALMOST_GREEDY: Final = 1e-5
"""Below this temperature the most probable token is taken: the scores divided by it may not fit float32."""


class TokenPicker:
    """Chooses one row's next token, in the order of `generate`: penalty, temperature, top-k, top-p."""

    def __init__(self, sampling: Sampling) -> None:
        """Build the processors that `sampling` asks for, and a random generator seeded with its seed."""
        self._greedy = sampling.temperature < ALMOST_GREEDY
        self._processors = LogitsProcessorList()
        if sampling.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
        if not self._greedy:
            if sampling.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_k > 0:
                self._processors.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(sampling.top_p)))
        # On the CPU whatever the model's device: the same seed then gives the same text everywhere.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> int:
        """Return the next token's id.

        Args:
            ids: the text so far, prompt included, (1, tokens), on the CPU.
            logits: the model's scores for the next token, (1, vocabulary).

        Raises:
            ValueError: the logits contain NaN.
        """
        scores = logits.to(device="cpu", dtype=torch.float32, copy=True)
        if torch.isnan(scores).any():
            raise ValueError("the model's logits contain NaN: its weights or its adapter's are damaged")
        scores = self._processors(ids, scores)  # type: ignore[arg-type]
        if self._greedy:
            return int(scores.argmax(dim=-1))
        probabilities = torch.softmax(scores, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
