"""Show that the base's rows are the base: their logits beside those of the bare checkpoint.

    bare = BareLogits.of(model, tokenizer)      # as transformers loaded it, before there is a bank
    bank = AdapterBank(model)                   # … and adapters
    proof = bare.compared_with(bank)            # proof.difference, proof.ok

The last token of each prompt is computed alone, after the others, as in generation: few tokens take another path
through the bank's linears than many. Whatever changes the base afterwards, its shared tensors included, shows as a
difference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.decoding import CachedForward
from minilora_hub.recording.logits import TOLERANCES, prompt_ids


@dataclass(frozen=True)
class BaseProof:
    """How near the base's rows are to the bare checkpoint.

    Attributes:
        prompts: number of fixed prompts.
        positions: number of positions whose logits were compared, over the whole vocabulary.
        difference: the largest difference of a logit.
        largest: the largest logit, in absolute value.
        same: the positions with the same most probable token.
        limit: the largest difference that rounding explains in this dtype.
    """

    prompts: int
    positions: int
    difference: float
    largest: float
    same: int
    limit: float

    @property
    def ok(self) -> bool:
        """Whether rounding explains the difference; not so for NaN."""
        return self.difference <= self.limit

    def described(self) -> str:
        """Return a sentence."""
        what = "is the bare checkpoint" if self.ok else "is NOT the bare checkpoint"
        return (
            f"The base column {what}: over {self.prompts} fixed prompts the largest difference of a logit is "
            f"{self.difference:.2g} (rounding explains {self.limit:g}; the largest logit is {self.largest:.3g}), and "
            f"the most probable token is the same at {self.same} of {self.positions} positions."
        )


@dataclass(frozen=True)
class BareLogits:
    """Logits of a checkpoint.

    Attributes:
        prompts: token ids, a tuple a prompt.
        logits: (positions, vocabulary) of each prompt.
        dtype: of the model, e.g. ``"float32"``.
    """

    prompts: tuple[tuple[int, ...], ...]
    logits: tuple[torch.Tensor, ...]
    dtype: str

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> BareLogits:
        """Compute them with a model that has no adapters."""
        prompts = prompt_ids(tokenizer, int(model.get_input_embeddings().num_embeddings))
        dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
        return cls(prompts, tuple(_logits(model, prompts)), dtype)

    def compared_with(self, bank: AdapterBank) -> BaseProof:
        """Compute the same with rows of the bare base in a bank. The caller makes sure that no other row runs."""
        found = _logits(bank.model, self.prompts, lambda: bank.rows([None]))
        pairs = list(zip(self.logits, found, strict=True))
        return BaseProof(
            prompts=len(pairs),
            positions=sum(len(bare) for bare, _ in pairs),
            difference=torch.stack([(bare - row).abs().max() for bare, row in pairs]).max().item(),
            largest=max(bare.abs().max().item() for bare, _ in pairs),
            same=sum(int((bare.argmax(-1) == row.argmax(-1)).sum()) for bare, row in pairs),
            limit=TOLERANCES.get(self.dtype, TOLERANCES["bfloat16"]),
        )


@torch.inference_mode()
def _logits(model: Any, prompts: Sequence[Sequence[int]], rows: Callable[[], Any] = nullcontext) -> list[torch.Tensor]:
    """Return the logits at all positions of each prompt, (positions, vocabulary), in float32 on the CPU."""
    found = []
    for prompt in prompts:
        forward, ids = CachedForward(model), torch.tensor([prompt])  # (1, seq)
        with rows():
            parts = [forward(part, every=True)[0] for part in (ids[:, :-1], ids[:, -1:])]
        found.append(torch.cat(parts).float().cpu())
    return found
