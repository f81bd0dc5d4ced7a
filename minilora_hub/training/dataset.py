"""The rows of a run as examples for training and validation, with what was skipped, and a hash of all of it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.data import BadRow, read_rows
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.tokens import IGNORED, Encoder, Example

SHOWN = 2


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is validated on.

    Attributes:
        train: examples.
        validation: held-out examples; empty where there is no validation.
        skipped: the rows that were left out.
        kinds: kind of row -> how many.
    """

    train: list[Example]
    validation: list[Example] = field(default_factory=list)
    skipped: list[BadRow] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(len(example.input_ids) for example in self.train)

    @property
    def learned_tokens(self) -> int:
        """Those of them that have a loss."""
        return sum(label != IGNORED for example in self.train for label in example.labels)

    @property
    def sha256(self) -> str:
        """Hash of every token and label, so that a resumed run can tell whether the data is the same."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.validation):
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        return digest.hexdigest()


def prepare_data(settings: TrainingSettings, tokenizer: Any, context: int) -> TrainingData:
    """Read, check and tokenize the rows, and hold some out.

    Args:
        settings: which data, and how rows are cut and learned.
        tokenizer: the base's.
        context: the base's context, in tokens.

    Raises:
        DataError: a row cannot be used and bad rows are not skipped, or none is left; the message names file and line.
    """
    recipe = settings.recipe
    if recipe.max_length and recipe.max_length > context:
        raise DataError(f"max_length={recipe.max_length}: the base's context has {context} tokens")
    encoder = Encoder(
        tokenizer,
        max_length=recipe.max_length or context,
        truncate=recipe.truncate,
        loss_on=recipe.loss_on,
        chat=recipe.chat,
    )
    skipped: list[BadRow] = []
    kinds: Counter[str] = Counter()
    train = _examples(settings.data, settings, encoder, skipped, kinds)
    if settings.validation_data:
        validation = _examples(settings.validation_data, settings, encoder, skipped, Counter())
    else:
        train, validation = _hold_out(train, recipe.validation, recipe.seed)
    return TrainingData(train, validation, skipped, dict(kinds))


def _examples(
    sources: tuple[str, ...],
    settings: TrainingSettings,
    encoder: Encoder,
    skipped: list[BadRow],
    kinds: Counter[str],
) -> list[Example]:
    examples, bad = [], []
    for row in read_rows(sources, split=settings.data_split, revision=settings.data_revision):
        example = row if isinstance(row, BadRow) else encoder.encode(row)
        if isinstance(example, BadRow):
            bad.append(example)
        else:
            examples.append(example)
            kinds[row.kind] += 1  # type: ignore[union-attr]
    if bad and not settings.skip_bad_rows:
        shown = "; ".join(f"{row.place}: {row.reason}" for row in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{shown}{more}. Repair {'them' if len(bad) > 1 else 'it'}, or pass --skip-bad-rows")
    if not examples:
        raise DataError(f"{', '.join(sources)}: no row is left: all {len(bad)} cannot be used, e.g. {bad[0].reason}")
    skipped += bad
    return examples


def _hold_out(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    if not share:
        return examples, []
    count = max(1, round(len(examples) * share))
    if count >= len(examples):
        raise DataError(
            f"validation={share}: that holds out all {len(examples)} rows: pass a smaller share, or more data"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))  # noqa: S311  not for security
    return (
        [example for index, example in enumerate(examples) if index not in chosen],
        [example for index, example in enumerate(examples) if index in chosen],
    )
