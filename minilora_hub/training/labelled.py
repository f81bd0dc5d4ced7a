"""Rows with labels: the tokenizer's needs, the examples, the base's head, the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.bases import loading
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import BaseModelError
from minilora_hub.training.data import read_rows
from minilora_hub.training.dataset import TrainingData, longest_row, write_parts
from minilora_hub.training.labelled_rows import AUTO_CLASSES, WORDS, LabelledEncoder, checked, labels_of
from minilora_hub.training.models import base_context
from minilora_hub.training.recipes import Recipe
from minilora_hub.training.row_kind import RowKind
from minilora_hub.training.settings import TrainingSettings


class LabelledRows(RowKind):
    """Texts with a class, or words with tags, that a model learns to tell.

    The head is the base's own where its checkpoint has one for these labels. Otherwise it is new: drawn with the run's
    seed, trained whole, and saved with the adapter.
    """

    def __init__(self, task: str, settings: TrainingSettings, base: ResolvedBase) -> None:
        super().__init__(task, settings, base)
        recipe, need = settings.recipe, "leave it out: the new head would be quantised, too"
        self.require(
            quantize=(recipe.quantize is None, need),
            loss_on=(recipe.loss_on == "completions", "leave it out"),
            chat=(recipe.chat, "leave it out"),
        )
        self.auto_class = AUTO_CLASSES[task]
        self.processor = load_tokenizer(base, task)
        self._collate = collator(task, self.processor)

    def prepare(self, folder: Path, begun: datetime) -> TrainingData:
        """See `RowKind.prepare`; there must be two labels."""
        settings, recipe, check = self.settings, self.settings.recipe, partial(checked, task=self.task)
        rows = read_rows(settings.data, split=settings.data_split, revision=settings.data_revision, check=check)
        named = _configuration(self.base).id2label or {}
        labels = labels_of(rows, [str(named[number]) for number in sorted(named)])
        longest = longest_row(settings, min(base_context(self.base), self.processor.model_max_length))
        encoder = LabelledEncoder(self.processor, labels, longest, recipe.truncate)
        train, validation, skipped = write_parts(settings, encoder.encode, folder, check)
        numbers = {name: number for number, name in enumerate(labels)}
        self.model_arguments = {"id2label": dict(enumerate(labels)), "label2id": numbers}
        self.model_arguments["pad_token_id"] = self.processor.pad_token_id  # a decoder finds a text's last token by it
        return TrainingData(train, validation, skipped, labels)

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """See `RowKind.collate`."""
        return self._collate(rows)

    def make_trainer(self, arguments: Any, **given: Any) -> Any:
        """See `RowKind.make_trainer`: transformers' Trainer."""
        from transformers import TrainingArguments

        names = [field.name for field in dataclasses.fields(TrainingArguments) if field.init]
        plain = TrainingArguments(**{name: getattr(arguments, name) for name in names})
        return make_trainer(args=plain, data_collator=self.collate, **given)


def load_tokenizer(resolved: ResolvedBase, task: str, adapter: Path | None = None) -> Any:
    """Load the tokenizer of an adapter or else of the base, with the padding token that the base knows, or else one.

    Raises:
        BaseModelError: it cannot be loaded, has no token to pad with, or does not know where its tokens come from.
    """
    own = own_tokenizer(adapter) if adapter else None
    tokenizer = own or loading.load_tokenizer(resolved)
    known = _configuration(resolved).get_text_config().pad_token_id
    if isinstance(known, int) and 0 <= known < len(tokenizer):  # RoBERTa counts positions by it
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(known)
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise BaseModelError(
            f"base {resolved.name!r}: its tokenizer has neither a padding nor an eos token: set pad_token in its "
            "tokenizer_config.json"
        )
    if task == WORDS and not tokenizer.is_fast:
        raise BaseModelError(
            f"base {resolved.name!r}: its tokenizer is not a fast one (tokenizer.json), so it does not say which "
            "tokens belong to a word"
        )
    return tokenizer


def _configuration(resolved: ResolvedBase) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)


def collator(task: str, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Return what makes a batch of examples."""
    from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding

    if task == WORDS:
        return DataCollatorForTokenClassification(tokenizer)
    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: pad([{"input_ids": row["input_ids"], "label": row["labels"][0]} for row in rows])


def make_trainer(*, recipe: Recipe, place_of: Callable[[list[int]], str | None], **arguments: Any) -> Any:
    """Return transformers' Trainer for an adapter and a head; see `TrainsAdapter`."""
    from minilora_hub.training.adapter_checkpoints import TrainsAdapter

    class LabelledTrainer(TrainsAdapter):
        """Trainer, with the model's own loss: the adapter's terms are in it."""

        def compute_loss(
            self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            self._last_inputs = inputs
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            self._require_finite(model, loss, inputs)
            return (loss, outputs) if return_outputs else loss

    trainer = LabelledTrainer(**arguments)
    trainer.recipe, trainer.place_of = recipe, place_of
    # Trainer believes that any model that takes `**kwargs` divides its loss by the labels of an accumulated batch. BERT
    # and others do not, and the loss would be a sum over micro-batches. So it is their mean.
    trainer.model_accepts_loss_kwargs = False
    return trainer
