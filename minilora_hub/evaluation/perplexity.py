"""Measure perplexity on general text that no adapter was trained on, to show how much an adapter forgets.

The text is the reference manual of Python 3.11, which is part of this package: English prose with some code, half a
million characters. Another text may be given (`--text`), so the text's name and hash go into the results.

It is cut into windows of equal length without overlap. In each, every token but the first is predicted from the tokens
before it.
"""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank

MANUAL = Path(__file__).parent / "general_text" / "python-3.11-reference.txt.gz"
WINDOW = 256
WINDOWS = 64
ROWS = 8
"""Windows in a forward: their logits are the largest thing in memory, 400 MB for a vocabulary of 49,152."""


@dataclass(frozen=True)
class GeneralText:
    """A text with a name; its sha256 distinguishes versions."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hash of the content in UTF-8."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def describe(self, windows: int) -> str:
        """Return a description of the text and the measurement."""
        return (
            f"perplexity on {self.name} (sha256 {self.sha256[:16]}), {windows} windows of {WINDOW} tokens without "
            "overlap, every token but a window's first predicted; lower is better"
        )


def read_text(file: Path | None = None) -> GeneralText:
    """Read the text: a file in UTF-8, or the manual.

    Raises:
        ValueError: the file cannot be read, or is empty.
    """
    if file is None:
        return GeneralText("Python 3.11's reference documentation", gzip.decompress(MANUAL.read_bytes()).decode())
    try:
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"text={str(file)!r}: must be a readable file in UTF-8 ({error})") from error
    if not content.strip():
        raise ValueError(f"text={str(file)!r}: must not be empty")
    return GeneralText(file.name, content)


def windows_of(tokenizer: Any, text: GeneralText) -> list[list[int]]:
    """Return the token ids of up to `WINDOWS` windows of `WINDOW` tokens, spread evenly over the text.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    ids: list[int] = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise ValueError(f"text {text.name!r} of {len(ids)} tokens: must have at least 2")
    if len(ids) < WINDOW:
        return [ids]
    starts = range(0, len(ids) - WINDOW + 1, WINDOW)
    count = min(WINDOWS, len(starts))
    chosen = [starts[index * len(starts) // count] for index in range(count)]
    return [ids[start : start + WINDOW] for start in chosen]


@torch.inference_mode()
def negative_log_likelihoods(bank: AdapterBank, adapter: str | None, windows: Sequence[Sequence[int]]) -> list[float]:
    """Return, for each window, the sum of -ln p (nats) of its tokens but the first.

    Args:
        bank: the base and its adapters.
        adapter: its name, held by the caller's `bank.use`; None for the bare base.
        windows: token ids, of one length.
    """
    device = next(bank.model.parameters()).device
    ids = torch.tensor([list(window) for window in windows], device=device)  # (rows, length)
    with bank.rows([adapter] * len(windows)):
        logits = bank.model(input_ids=ids, use_cache=False, return_dict=True).logits  # (rows, length, vocabulary)
    sums = []
    for row, predicted in zip(ids, logits, strict=True):  # one at a time: in fp32 they are large
        losses = torch.nn.functional.cross_entropy(predicted[:-1].float(), row[1:], reduction="none")
        sums.append(float(losses.double().sum()))
    return sums
