"""The rows of a run as examples for training and validation, with what was skipped, and a hash of all of it."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.data import BadRow, read_rows
from minilora_hub.training.example_rows import ExampleRows, ExampleWriter
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.tokens import Encoder

SHOWN = 2


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is validated on.

    Attributes:
        train: the examples.
        validation: held-out ones; empty where there is no validation.
        skipped: the rows that were left out.
        kinds: kind of row -> how many.
    """

    train: ExampleRows
    validation: ExampleRows
    skipped: list[BadRow] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(self.train.lengths)

    @property
    def learned_tokens(self) -> int:
        """Those of them that have a loss."""
        return sum(self.train.learned)

    @property
    def sha256(self) -> str:
        """Hash of every token and label, so that a resumed run can tell whether the data is the same."""
        digest = hashlib.sha256()
        for example in chain(self.train, self.validation):
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        return digest.hexdigest()

    @property
    def largest_id(self) -> int:
        """The largest token id in it."""
        return max(self.train.largest_id, self.validation.largest_id)

    def place_of(self, ids: list[int]) -> str | None:
        """Return where the row with these ids came from; None if there is none."""
        return self.train.place_of(ids) or self.validation.place_of(ids)


def prepare_data(
    settings: TrainingSettings,
    tokenizer: Any,
    context: int,
    folder: Path,
    *,
    ends: Sequence[int] | None = None,
    now: datetime | None = None,
) -> TrainingData:
    """Read, check and tokenize the rows, and hold some out.

    Args:
        settings: which data, and how rows are cut and learned.
        tokenizer: the base's.
        context: the base's context, in tokens.
        folder: where the tokens are kept, in files; it must stay as long as they are used.
        ends: see `Encoder`.
        now: see `Encoder`.

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
        ends=ends,
        now=now,
    )
    skipped: list[BadRow] = []
    kinds: Counter[str] = Counter()
    train = _examples(settings.data, settings, encoder, folder / "train.arrow", skipped, kinds)
    if settings.validation_data:
        file = folder / "validation.arrow"
        validation = _examples(settings.validation_data, settings, encoder, file, skipped, Counter())
    else:
        train, validation = _hold_out(train, recipe.validation, recipe.seed)
    return TrainingData(train, validation, skipped, dict(kinds))


def _examples(
    sources: tuple[str, ...],
    settings: TrainingSettings,
    encoder: Encoder,
    file: Path,
    skipped: list[BadRow],
    kinds: Counter[str],
) -> ExampleRows:
    writer, bad = ExampleWriter(file), []
    for row in read_rows(sources, split=settings.data_split, revision=settings.data_revision):
        example = row if isinstance(row, BadRow) else encoder.encode(row)
        if isinstance(example, BadRow):
            bad.append(example)
        else:
            writer.add(example)
            kinds[row.kind] += 1  # type: ignore[union-attr]
    examples = writer.finish()
    if bad and not settings.skip_bad_rows:
        shown = "; ".join(f"{row.place}: {row.reason}" for row in bad[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{shown}{more}. Repair {'them' if len(bad) > 1 else 'it'}, or pass --skip-bad-rows")
    if not examples:
        raise DataError(f"{', '.join(sources)}: no row is left: all {len(bad)} cannot be used, e.g. {bad[0].reason}")
    skipped += bad
    return examples


def _hold_out(examples: ExampleRows, share: float, seed: int) -> tuple[ExampleRows, ExampleRows]:
    if not share:
        return examples, examples.select([])
    count = max(1, round(len(examples) * share))
    if count >= len(examples):
        raise DataError(
            f"validation={share}: that holds out all {len(examples)} rows: pass a smaller share, or more data"
        )
    chosen = set(random.Random(seed).sample(range(len(examples)), count))  # noqa: S311  not for security
    return (
        examples.select([index for index in range(len(examples)) if index not in chosen]),
        examples.select(sorted(chosen)),
    )
