"""What differs in a run on labelled rows: the tokenizer's needs, the examples, the base's head, the trainer.

The head is the base's own where its checkpoint has one for these labels. Otherwise it is new: drawn with the run's
seed, trained whole, and saved with the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.bases import loading
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import BaseModelError, TrainingError
from minilora_hub.training.data import read_rows
from minilora_hub.training.dataset import TrainingData, hold_out, write_examples
from minilora_hub.training.labelled_rows import AUTO_CLASSES, WORDS, LabelledEncoder, checked, labels_of
from minilora_hub.training.recipes import Recipe
from minilora_hub.training.settings import TrainingSettings

METHODS = ("dora", "mixlora", "mixdora")


def check_settings(settings: TrainingSettings, task: str) -> None:
    """Check that a run's settings are possible on labelled rows.

    Raises:
        TrainingError: one is not; the message names it.
    """
    recipe = settings.recipe
    needs = {
        "method": (settings.method, settings.method in METHODS, f"must be one of {', '.join(METHODS)}"),
        "from_adapter": (settings.from_adapter, not settings.from_adapter, "leave it out"),
        "objective": (settings.objective, not settings.objective, "leave it out"),
        "budget": (recipe.budget, recipe.budget is None, "leave it out"),
        "init": (recipe.init, recipe.init == "zero", "leave it out"),
        "batching": (recipe.batching, recipe.batching != "packed", "must be shuffled or length-grouped"),
        "quantize": (recipe.quantize, recipe.quantize is None, "leave it out: the new head would be quantised, too"),
    }
    for name, (value, holds, need) in needs.items():
        if not holds:
            raise TrainingError(f"{name}={value!r} on rows for {task}: {need} (--task text-generation: other rows)")


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


def prepare(
    settings: TrainingSettings, task: str, tokenizer: Any, resolved: ResolvedBase, context: int, folder: Path
) -> TrainingData:
    """Read, check and tokenize labelled rows, and split off the validation rows.

    Raises:
        DataError: a row cannot be used and bad rows are not skipped, or there are not two labels.
    """
    recipe, check = settings.recipe, partial(checked, task=task)
    rows = read_rows(settings.data, split=settings.data_split, revision=settings.data_revision, check=check)
    named = _configuration(resolved).id2label or {}
    labels = labels_of(rows, [str(named[number]) for number in sorted(named)])
    longest = min(recipe.max_length or context, context, tokenizer.model_max_length)
    encoder = LabelledEncoder(tokenizer, labels, longest, recipe.truncate)
    skipped: list[Any] = []
    train = write_examples(settings.data, settings, encoder.encode, folder / "train.arrow", skipped, check)
    if settings.validation_data:
        file = folder / "validation.arrow"
        validation = write_examples(settings.validation_data, settings, encoder.encode, file, skipped, check)
    else:
        train, validation = hold_out(train, recipe.validation, recipe.seed)
    return TrainingData(train, validation, skipped, labels)


def _configuration(resolved: ResolvedBase) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(resolved.path, trust_remote_code=False)


def head_arguments(labels: tuple[str, ...], tokenizer: Any) -> dict[str, Any]:
    """Return the arguments for the base's from_pretrained that describe its head."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    return names | {"pad_token_id": tokenizer.pad_token_id}  # a decoder finds a text's last token by it


def build_model(
    settings: TrainingSettings, task: str, resolved: ResolvedBase, head: dict[str, Any], arguments: dict[str, Any]
) -> Any:
    """Load the base with the task's head, and add a fresh adapter; `head` is of `head_arguments`."""
    from minilora_hub import DoraConfig, MixLoraConfig
    from minilora_hub.remote_code.modeling_minilora import adapted_class

    prefix, config = ("Dora", DoraConfig) if settings.method == "dora" else ("MixLora", MixLoraConfig)
    model_class = adapted_class(prefix, AUTO_CLASSES[task])
    arguments = arguments | head
    if resolved.revision:
        arguments = arguments | {"revision": resolved.revision}
    try:
        made = config(**settings.recipe.adapter)
        return model_class.from_base(settings.base, made, seed=settings.recipe.seed, **arguments)
    except OSError as error:
        raise BaseModelError(" ".join(str(error).split())) from error


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
