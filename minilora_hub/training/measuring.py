"""Measurements of the first adapters: exact match, sample answers, expert load, and what the machine is.

Everything takes the model and the items it is given, so base and adapter are measured by the same lines.
"""

from __future__ import annotations

import math
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minilora_hub.results import Evaluation

NEW_TOKENS = 48
DECODING = f"greedy, at most {NEW_TOKENS} new tokens"
NOTE = (
    "an answer counts only if all of its text equals the reference: a right answer in a sentence, or a JSON record "
    "with other spacing or capitals, does not"
)
BATCH_SIZE = 25
LIBRARIES = ("torch", "transformers", "peft", "minilora_hub")


def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Greedy answers to chat prompts. The tokenizer must pad on the left."""
    import torch

    texts: list[str] = []
    for start in range(0, len(prompts), BATCH_SIZE):
        inputs = _chats(tokenizer, prompts[start : start + BATCH_SIZE])
        with torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def expert_load(model: Any, tokenizer: Any, prompts: list[str]) -> tuple[tuple[float, ...], ...] | None:
    """Each expert's share of the routed prompt tokens, per layer; None for a model without experts."""
    import torch

    if model.config.model_type != "mixlora":
        return None
    counts: Any = 0
    for start in range(0, len(prompts), BATCH_SIZE):
        inputs = _chats(tokenizer, prompts[start : start + BATCH_SIZE])
        with torch.inference_mode():
            selected = torch.stack(model(**inputs, output_routing=True).selected_experts)  # (layers, batch, seq, K)
        real = inputs["attention_mask"].bool()  # (batch, seq): padding does not count
        chosen = selected[:, real].flatten(1)  # (layers, tokens * K), -1 where a slot has no expert
        counts = counts + torch.nn.functional.one_hot(chosen + 1, model.config.num_experts + 1).sum(dim=1)[:, 1:]
    shares = counts.double() / counts.sum(dim=1, keepdim=True)
    return tuple(tuple(round(share, 4) for share in layer) for layer in shares.tolist())


def _chats(tokenizer: Any, prompts: list[str]) -> Any:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )


def exact_matches(texts: list[str], items: list[dict[str, str]]) -> dict[str, list[bool]]:
    """Per task, which answers are exactly the item's completion."""
    hits: dict[str, list[bool]] = {}
    for item, text in zip(items, texts, strict=True):
        hits.setdefault(item["task"], []).append(text == item["completion"])
    return dict(sorted(hits.items()))


def evaluations(
    adapter: dict[str, list[bool]], base: dict[str, list[bool]], names: dict[str, str], command: str
) -> tuple[Evaluation, ...]:
    """One entry a task, from the hits of adapter and base on the same items; `names` says what a task is."""
    return tuple(
        Evaluation(
            task=names[task],
            metric="exact match",
            value=round(sum(hits) / len(hits), 4),
            base_value=round(sum(base[task]) / len(base[task]), 4),
            n=len(hits),
            interval=wilson_interval(sum(hits), len(hits)),
            command=command,
            note=NOTE,
        )
        for task, hits in adapter.items()
    )


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share: the 95% one for the default z. It holds near 0 and 1, too."""
    share, spread = hits / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4)


def hardware() -> str:
    """What this process computes on, without the machine's name."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"CPU: {os.cpu_count()} cores of {name}"


def library_versions() -> dict[str, str]:
    """Versions of the packages that made the numbers."""
    return {name: version(name) for name in LIBRARIES}
