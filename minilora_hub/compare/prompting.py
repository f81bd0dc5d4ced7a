"""Prompt each model of a comparison with its own tokenizer, chat template and end tokens.

An adapter may have a different chat template than its base, or additional tokens, so that rows of one batch may have
different tokens for the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from minilora_hub.adapter_folder.companions import companion_files, own_generation_settings, own_tokenizer
from minilora_hub.adapter_folder.names import TOKENIZING
from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.base_loading import refuse_unknown_tokens


@dataclass(frozen=True)
class Prompting:
    """How one model is prompted.

    Attributes:
        tokenizer: its tokenizer.
        ends: ids of the tokens that end its answers.
        rows: number of tokens that the base has embeddings for; None if unknown.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: frozenset[int]
    rows: int | None = None

    def chat_ids(self, turns: Sequence[dict[str, str]]) -> list[int] | None:
        """Return the prompt ids of a conversation; None if there is no chat template.

        Raises:
            AdapterError: the template rejects the conversation, or fails.
            ValueError: the base does not know a token.
        """
        if not getattr(self.tokenizer, "chat_template", None):
            return None
        try:
            encoded: Any = self.tokenizer.apply_chat_template(list(turns), add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program, and may raise anything
            reason = " ".join(str(error).split())[:200]
            raise AdapterError(f"the chat template refuses the prompt ({type(error).__name__}: {reason})") from error
        return self.known(list(encoded["input_ids"]))

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of a text to continue, with one BOS token and without an EOS token.

        Raises:
            ValueError: the base does not know a token.
        """
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if bare and bare[0] == self.tokenizer.bos_token_id:
            return self.known(bare)
        ids = list(self.tokenizer(text)["input_ids"])
        ended = ids[-1:] == [self.tokenizer.eos_token_id] and ids[-1 - len(bare) : -1] == bare
        return self.known(ids[:-1] if ended else ids)

    def known(self, ids: list[int]) -> list[int]:
        """Return the ids, which must all have an embedding.

        Raises:
            ValueError: the base does not know a token.
        """
        if self.rows is not None:
            refuse_unknown_tokens(ids, self.rows, self.tokenizer)
        return ids

    @property
    def end_names(self) -> list[str]:
        """The texts of the tokens that end its answers."""
        return [str(self.tokenizer.decode([token])) for token in sorted(self.ends)]

    def differs_from(self, other: Prompting) -> list[str]:
        """List the differences from the base's prompting, in a few words each."""
        words = []
        if self.tokenizer is not other.tokenizer and self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            words.append("own tokenizer")
        if getattr(self.tokenizer, "chat_template", None) != getattr(other.tokenizer, "chat_template", None):
            words.append("own chat template" if getattr(self.tokenizer, "chat_template", None) else "no chat template")
        if self.ends != other.ends:
            words.append(f"ends at {' '.join(self.end_names) or 'no token'}")
        return words


class Promptings:
    """The promptings of a base and of adapters on it. Adapters with the same tokenizer files share one tokenizer.

    Args:
        model: the base.
        tokenizer: the base's.

    Attributes:
        base: the prompting of the base.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set up the base's prompting."""
        self._settings = getattr(model, "generation_config", None)
        self._rows = _embedding_rows(model)
        self._tokenizers: dict[str, PreTrainedTokenizerBase | None] = {}
        self.base = Prompting(tokenizer, frozenset(end_token_ids(tokenizer, self._settings)), self._rows)

    def of(self, folder: Path) -> Prompting:
        """Return the prompting of an adapter.

        Raises:
            AdapterError: its tokenizer cannot be read, or has more tokens than the base has embeddings.
        """
        files = companion_files(folder, TOKENIZING)
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
        key = digest.hexdigest()
        if key not in self._tokenizers:
            found = own_tokenizer(folder, self.base.tokenizer) if files else None
            if found is not None:
                self._check_ids(folder, found)
            self._tokenizers[key] = found
        tokenizer = self._tokenizers[key] or self.base.tokenizer
        settings = own_generation_settings(folder) or self._settings
        return Prompting(tokenizer, frozenset(end_token_ids(tokenizer, settings)), self._rows)

    def _check_ids(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        vocabulary = tokenizer.get_vocab()
        largest = max(vocabulary.values(), default=0)
        if self._rows is None or largest < self._rows or vocabulary == self.base.tokenizer.get_vocab():
            return
        raise AdapterError(
            f"adapter {folder.name!r}: its tokenizer has a token {largest} ({tokenizer.decode([largest])!r}), and the "
            f"base has embeddings for {self._rows} tokens: the base that it was trained on had more"
        )


def _embedding_rows(model: Any) -> int | None:
    """Return the number of tokens that a model has embeddings for; None if unknown."""
    find = getattr(model, "get_input_embeddings", None)
    weight = None if find is None else getattr(find(), "weight", None)
    return None if weight is None else int(weight.shape[0])
