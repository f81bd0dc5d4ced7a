"""Choose an adapter by the prompt: an index of prompts that each adapter is for, compared with a new one.

    index = AdapterIndex.build(model, tokenizer, fingerprint, {"dates": ("adapters/dates", prompts), …})
    index.save("adapters.index")
    choice = index.choose(embedding(model, tokenizer, "Write as YYYY-MM-DD: 3 May 1999"))
    choice.adapter, choice.similarity, choice.runner_up

The base itself embeds a prompt, so no second model is loaded: the mean over the tokens of the bare base's last hidden
states, scaled to length one. An adapter's similarity is the largest cosine with one of its prompts, not that with their
mean: a task that has several formats is no single direction. docs/evidence.md compares both.

The index holds these vectors, no text of the prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from minilora_hub.documents import write_whole
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    from minilora_hub.compare.engine import CompareEngine

FORMAT = 1
HEAD, VECTORS, OWNERS = "minilora_index", "vectors", "owners"
MOST_TOKENS, MOST_CHARACTERS = 512, 8192
"""Of a prompt that are read, so that a long one costs no more; what a prompt asks for is mostly said at its start."""


@dataclass(frozen=True)
class IndexedAdapter:
    """An adapter of an index: its name, its folder or Hub id, and how many prompts the index has of it."""

    name: str
    source: str
    prompts: int


@dataclass(frozen=True)
class Choice:
    """The chosen adapter, its source and its similarity; the second best, if there is one."""

    adapter: str
    source: str
    similarity: float
    runner_up: tuple[str, float] | None = None

    def described(self) -> str:
        """Return the choice and its reason in a few words."""
        second = f", then {self.runner_up[0]} with {self.runner_up[1]:.3f}" if self.runner_up else ""
        return f"{self.adapter}: similarity {self.similarity:.3f}{second}"

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON data."""
        second = None if self.runner_up is None else dict(zip(("adapter", "similarity"), self.runner_up, strict=True))
        return {"adapter": self.adapter, "similarity": self.similarity, "runner_up": second}


@dataclass(frozen=True)
class AdapterIndex:
    """Prompts of adapters as vectors of their base.

    Attributes:
        base: the base's name.
        fingerprint: hash of the base's weights, whose vectors these are.
        adapters: the adapters, at least two.
        vectors: the prompts, (prompts, d), each of length one.
        owners: number of each prompt's adapter, (prompts).
    """

    base: str
    fingerprint: str
    adapters: tuple[IndexedAdapter, ...]
    vectors: torch.Tensor
    owners: torch.Tensor

    @classmethod
    def build(
        cls,
        model: Any,
        tokenizer: Any,
        base: str,
        fingerprint: str,
        prompts: Mapping[str, tuple[str, Sequence[str]]],
    ) -> AdapterIndex:
        """Embed the prompts of adapters.

        Args:
            model: the bare base.
            tokenizer: the base's.
            base: the base's name.
            fingerprint: hash of its weights.
            prompts: name of an adapter -> its folder or Hub id, and prompts that it is for.

        Raises:
            AdapterError: there are fewer than two adapters, or one has no prompts.
        """
        if len(prompts) < 2:
            raise AdapterError(f"{len(prompts)} adapter: there must be at least 2 to choose from")
        for name, (_, texts) in prompts.items():
            if not texts:
                raise AdapterError(f"adapter {name!r}: there are no prompts of it")
        vectors = [embedding(model, tokenizer, text) for _, texts in prompts.values() for text in texts]
        owners = [number for number, (_, texts) in enumerate(prompts.values()) for _ in texts]
        adapters = tuple(IndexedAdapter(name, source, len(texts)) for name, (source, texts) in prompts.items())
        return cls(base, fingerprint, adapters, torch.stack(vectors), torch.tensor(owners))

    def choose(self, vector: torch.Tensor, among: Sequence[str] | None = None) -> Choice:
        """Choose the adapter with the prompt that is nearest to `vector`, (d), of length one.

        Args:
            vector: the `embedding` of a prompt.
            among: names of adapters; others are not chosen. Default: all.

        Raises:
            AdapterError: the index has none of these.
        """
        cosines = self.vectors @ vector.cpu()  # (prompts)
        best = [
            (cosines[self.owners == number].max().item(), adapter)
            for number, adapter in enumerate(self.adapters)
            if among is None or adapter.name in among
        ]
        if not best:
            raise AdapterError(f"index: it has none of the adapters {', '.join(among or ())}")
        best.sort(key=lambda pair: -pair[0])
        (similarity, first), rest = best[0], best[1:]
        return Choice(first.name, first.source, similarity, (rest[0][1].name, rest[0][0]) if rest else None)

    def require_base(self, fingerprint: str) -> None:
        """Raise an AdapterError if the index was built on a base with other weights."""
        if "unknown" not in (fingerprint, self.fingerprint) and fingerprint != self.fingerprint:
            raise AdapterError(
                f"index: it was built on {self.base!r} with fingerprint {self.fingerprint}, and this base has "
                f"{fingerprint}: build it again"
            )

    def save(self, file: str | Path) -> None:
        """Write it into one file, whole or not at all."""
        head = {"format": FORMAT, "base": self.base, "fingerprint": self.fingerprint}
        head["adapters"] = [asdict(adapter) for adapter in self.adapters]  # type: ignore[assignment]
        tensors = {VECTORS: self.vectors.contiguous(), OWNERS: self.owners}
        write_whole(Path(file), save(tensors, {HEAD: json.dumps(head)}))

    @classmethod
    def load(cls, file: str | Path) -> AdapterIndex:
        """Read a file that `save` has written.

        Raises:
            AdapterError: it cannot be read, is of a newer format, or its parts do not fit each other.
        """
        try:
            with safe_open(file, "pt") as tensors:
                head = json.loads((tensors.metadata() or {})[HEAD])
                vectors, owners = tensors.get_tensor(VECTORS), tensors.get_tensor(OWNERS)
            if head["format"] != FORMAT:
                raise AdapterError(f"index {str(file)!r}: format={head['format']!r}: this version reads {FORMAT}")
            adapters = tuple(IndexedAdapter(**adapter) for adapter in head["adapters"])
            counts = torch.bincount(owners, minlength=len(adapters)).tolist()
            if counts != [adapter.prompts for adapter in adapters] or len(vectors) != len(owners) or len(adapters) < 2:
                raise ValueError("its parts do not fit each other")
            if vectors.dim() != 2 or not bool(vectors.isfinite().all()):
                raise ValueError("its vectors are not finite")
            return cls(head["base"], head["fingerprint"], adapters, vectors, owners)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise AdapterError(f"index {str(file)!r} cannot be read: {error}") from None


@torch.no_grad()
def embedding(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """Return the mean over a text's tokens of a base's last hidden states, scaled to length one: (d), float32.

    Args:
        model: the bare base.
        tokenizer: the base's.
        text: a user's prompt, without a chat template.

    Raises:
        ValueError: it has no token.
    """
    ids = prompt_tokens(tokenizer, text)
    decoder = model._modules.get(getattr(model, "base_model_prefix", ""), model)
    tokens = torch.tensor([ids], device=next(model.parameters()).device)
    hidden = decoder(tokens, use_cache=False).last_hidden_state[0].float()  # (tokens, d)
    return F.normalize(hidden.mean(dim=0), dim=0).cpu()


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that `embedding` reads.

    Raises:
        ValueError: there are none.
    """
    ids = tokenizer(text[:MOST_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"][:MOST_TOKENS]
    if not ids:
        raise ValueError(f"prompt={text[:40]!r}: must hold at least one token")
    return ids


def choose_in(engine: CompareEngine, index: AdapterIndex, text: str, among: Sequence[str] | None = None) -> Choice:
    """Choose by a prompt with the base of an engine, between the steps of its streams; see `AdapterIndex.choose`."""
    with engine.exclusive(), engine.bank.rows([None]):
        vector = embedding(engine.bank.model, engine.tokenizer, text)
    return index.choose(vector, among)
