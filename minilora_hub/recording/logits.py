"""Record reference logits, and compare a model's logits with them: fixed prompts, and the largest logits after them.

They are recorded when a repo is built and computed again when it is verified, on the CPU in the dtype that
`verification.json` names, with `F.linear` only (see `remote_code/few_rows.py`): only the matrix library may differ
between two machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from minilora_hub.adapter_folder.verification import TOP_LOGITS, Prompt, plain_prompts

PROMPTS = (
    "The capital of France is",
    "Write this date as YYYY-MM-DD: the 3rd of May 1999",
    "def fibonacci(n):\n    ",
)
TOLERANCES = {"float32": 2e-3, "float16": 0.1, "bfloat16": 0.5}
"""The largest difference of one model's logits on two machines; half precision rounds every activation."""

LIBRARIES = ("torch", "transformers", "safetensors", "peft")


@dataclass(frozen=True)
class TopLogits:
    """Prompts, and per prompt the tokens with the largest logits at the last position, largest first."""

    prompts: tuple[Prompt, ...]
    top_tokens: tuple[tuple[int, ...], ...]
    top_logits: tuple[tuple[float, ...], ...]


def prompt_ids(tokenizer: Any | None, vocabulary: int) -> tuple[tuple[int, ...], ...]:
    """Return the fixed prompts as token ids; without a tokenizer, fixed ids spread over the vocabulary.

    Raises:
        ValueError: the tokenizer returns an id that is not in the base's vocabulary.
    """
    if tokenizer is None:
        return tuple(tuple((7 + 31 * start + 97 * i) % vocabulary for i in range(12)) for start in range(3))
    from minilora_hub.remote_code.base_loading import refuse_unknown_tokens

    prompts = tuple(tuple(tokenizer(text)["input_ids"]) for text in PROMPTS)
    for prompt in prompts:
        refuse_unknown_tokens(prompt, vocabulary, tokenizer)
    return prompts


def record(model: Any, prompts: Sequence[Prompt]) -> TopLogits:
    """Compute the largest logits after each prompt.

    Args:
        model: a model in eval mode.
        prompts: its inputs.
    """
    import torch

    from minilora_hub.recording.model_outputs import arguments_of, recorded_row
    from minilora_hub.remote_code.few_rows import plain_products

    tokens, logits = [], []
    with torch.no_grad(), plain_products():
        for prompt in plain_prompts(prompts):
            row = recorded_row(model(**arguments_of(model, prompt)))
            top = row.topk(min(TOP_LOGITS, row.numel()))
            tokens.append(tuple(top.indices.tolist()))
            logits.append(tuple(round(value, 6) for value in top.values.tolist()))
    return TopLogits(tuple(prompts), tuple(tokens), tuple(logits))


def logits_of(
    model: Any, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[float | None]]:
    """Return `model_outputs.logits_of`, computed as in a recording, for `difference`."""
    from minilora_hub.recording import model_outputs
    from minilora_hub.remote_code.few_rows import plain_products

    with plain_products():
        return model_outputs.logits_of(model, plain_prompts(prompts), tokens)


def difference(
    top_logits: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]], highest_other: Sequence[float | None]
) -> float:
    """Return the largest difference between a model's logits and recorded ones.

    Args:
        top_logits: the recorded logits, the largest first.
        wanted: the model's logits of the same tokens.
        highest_other: per prompt, the model's largest logit of all other tokens; None where there are none.

    Returns:
        The largest difference, including how far a token that was not recorded exceeds the last one that was. NaN
        where the model's logits are NaN.
    """
    worst = 0.0
    for recorded, found, other in zip(top_logits, wanted, highest_other, strict=True):
        gaps = [abs(a - b) for a, b in zip(recorded, found, strict=True)]
        gaps += [other - recorded[-1]] if other is not None else []
        if any(gap != gap for gap in gaps):
            return float("nan")
        worst = max(worst, *gaps)
    return worst


@cache
def libraries() -> dict[str, str]:
    """Return the versions of the libraries that compute logits."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found
