"""Store the tokenized training and validation rows in memory-mapped Arrow files.

As Python integers, tokens need about thirty times the size of the file. Only the location and the token counts of each
row are kept in memory.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.training.data import Row, read_rows
from minilora_hub.training.settings import TrainingSettings
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import IGNORED, Encoder, Example
from minilora_hub.training.votes import VotePairs

SHOWN = 2
SHOWN_PLACES = 3
ROWS_AT_ONCE = 50
"""Rows that are converted to Python objects at a time."""


@dataclass(frozen=True)
class ExampleRows:
    """Examples in an Arrow file, in order.

    Attributes:
        dataset: a `datasets.Dataset` with the columns ``input_ids`` and ``labels``, and those of `Example.more`.
        places: location of each row in the data.
        lengths: number of tokens of each row.
        learned: number of tokens of each row that have a loss.
    """

    dataset: Any
    places: list[str]
    lengths: list[int]
    learned: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        return Example(self.places[index], **self._tokens[index])

    def __iter__(self) -> Iterator[Example]:
        places = iter(self.places)
        for columns in self._tokens.iter(ROWS_AT_ONCE):
            for ids, labels in zip(columns["input_ids"], columns["labels"], strict=True):
                yield Example(next(places), ids, labels)

    @property
    def _tokens(self) -> Any:
        return self.dataset.select_columns(["input_ids", "labels"])

    def select(self, indices: Sequence[int]) -> ExampleRows:
        """Return the rows with these indices, in this order; nothing is copied."""
        places = [self.places[index] for index in indices]
        lengths = [self.lengths[index] for index in indices]
        return ExampleRows(self.dataset.select(indices), places, lengths, [self.learned[index] for index in indices])


@dataclass(frozen=True)
class TrainingData:
    """The training and validation examples of a run.

    Attributes:
        train: the training examples.
        validation: the validation examples; empty without validation.
        skipped: the rows that were skipped.
        labels: of labelled rows, the names of the classes; `labels` of an example holds their numbers.
        pictures: of rows with pictures, a hash of them.
        votes: of votes, the answers beside each row, which is a chosen one.
    """

    train: ExampleRows
    validation: ExampleRows
    skipped: list[BadRow]
    labels: tuple[str, ...] = ()
    pictures: str = ""
    votes: VotePairs | None = None

    @property
    def tokens(self) -> int:
        """Tokens in the training rows."""
        return sum(self.train.lengths)

    @property
    def learned_tokens(self) -> int:
        """Tokens in the training rows that have a loss."""
        return sum(self.train.learned)

    @property
    def sha256(self) -> str:
        """Hash of every token, label and picture, by which a resumed run detects changed data."""
        digest = hashlib.sha256(json.dumps(self.labels).encode() if self.labels else self.pictures.encode())
        for example in chain(self.train, self.validation, self._rejected):
            digest.update(json.dumps([example.input_ids, example.labels]).encode())
        return digest.hexdigest()

    @property
    def held_out_pairs(self) -> bool:
        """Whether the validation rows are votes."""
        pairs = self.votes.pairs if self.votes else {}
        return bool(self.validation) and all(tuple(example.input_ids) in pairs for example in self.validation)

    @property
    def _rejected(self) -> list[Example]:
        return [one for pair in self.votes.pairs.values() for one in pair.rejected] if self.votes else []

    @property
    def largest_id(self) -> int:
        """The largest token id in the data."""
        return max(max(example.input_ids) for example in chain(self.train, self.validation, self._rejected))

    def place_of(self, ids: list[int]) -> str | None:
        """Return the location of the row with these ids, or of the first rows that have them; None if there is none."""
        found = [
            rows.places[index]
            for rows in (self.train, self.validation)
            for index, length in enumerate(rows.lengths)
            if length == len(ids) and rows[index].input_ids == ids
        ]
        return " or ".join(found[:SHOWN_PLACES]) or None


def prepare_data(
    settings: TrainingSettings,
    tokenizer: Any,
    context: int,
    folder: Path,
    *,
    ends: Sequence[int] | None = None,
    now: datetime | None = None,
) -> TrainingData:
    """Read, check and tokenize the rows, and split off the validation rows.

    Args:
        settings: the data, and how rows are truncated and labelled.
        tokenizer: the base's.
        context: the base's context, in tokens.
        folder: folder for the token files; it must exist as long as they are used.
        ends: see `Encoder`.
        now: see `Encoder`.

    Raises:
        DataError: a row cannot be used and bad rows are not skipped, or none is left; the message names file and line.
    """
    recipe = settings.recipe
    encoder = Encoder(
        tokenizer,
        max_length=longest_row(settings, context),
        truncate=recipe.truncate,
        loss_on=recipe.loss_on,
        chat=recipe.chat,
        ends=ends,
        now=now,
    )
    if not settings.from_votes:
        return TrainingData(*write_parts(settings, encoder.encode, folder))
    votes, skipped = VotePairs(settings.from_votes, encoder), list[BadRow]()

    def write(source: tuple[str, ...], name: str, encode: Any, check: Any = None) -> ExampleRows:
        return _write_examples(source, settings, encode, folder / name, skipped, check, {})

    train = write((votes.file,), "train.arrow", votes.encode, votes.check)
    votes.require_enough()
    if settings.validation_data:
        validation = write(settings.validation_data, "validation.arrow", encoder.encode)
    else:
        train, validation = hold_out(train, recipe.validation, recipe.seed, votes.prompts)
    return TrainingData(train, validation, skipped, votes=votes)


def longest_row(settings: TrainingSettings, context: int) -> int:
    """Return how many tokens a row may have; raise DataError where that is more than the base's `context`."""
    longest = settings.recipe.max_length or context
    if longest > context:
        raise DataError(f"max_length={longest}: the base's context has {context} tokens")
    return longest


def write_parts(
    settings: TrainingSettings,
    encode: Callable[[Row], Example | BadRow],
    folder: Path,
    check: Callable[[str, Any], Row | BadRow] | None = None,
    columns: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[ExampleRows, ExampleRows, list[BadRow]]:
    """Write the examples of a run into Arrow files, and split off those to validate on.

    Args:
        settings: of the run.
        encode: makes an example of a row.
        folder: for the files.
        check: as in `read_rows`.
        columns: types of the columns beside the tokens, which hold `Example.more`.

    Returns:
        The examples to train on and to validate on, and the rows that were skipped.
    """
    skipped: list[BadRow] = []

    def write(sources: tuple[str, ...], name: str) -> ExampleRows:
        return _write_examples(sources, settings, encode, folder / name, skipped, check, columns)

    train = write(settings.data, "train.arrow")
    if settings.validation_data:
        return train, write(settings.validation_data, "validation.arrow"), skipped
    return *hold_out(train, settings.recipe.validation, settings.recipe.seed), skipped


def _write_examples(
    sources: tuple[str, ...],
    settings: TrainingSettings,
    encode: Callable[[Row], Example | BadRow | None],
    file: Path,
    skipped: list[BadRow],
    check: Callable[[str, Any], Row | BadRow] | None,
    more: Mapping[str, Any],
) -> ExampleRows:
    """Write the examples of some files into an Arrow file, and open it.

    `check` is as in `read_rows`; a row for which `encode` returns None is none to train on.
    """
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    bad: list[BadRow] = []
    places, lengths, learned = list[str](), list[int](), list[int]()
    columns = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), **more})
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)  # a process that has mapped the old file is not affected
        with ArrowWriter(features=columns, path=str(file), writer_batch_size=ROWS_AT_ONCE) as writer:
            rows = read_rows(sources, split=settings.data_split, revision=settings.data_revision, check=check)
            for row in rows:
                example = row if isinstance(row, BadRow) else encode(row)
                if isinstance(example, BadRow):
                    bad.append(example)
                    continue
                if example is None:
                    continue
                writer.write({"input_ids": example.input_ids, "labels": example.labels, **example.more})
                places.append(example.place)
                lengths.append(len(example.input_ids))
                learned.append(len(example.labels) - example.labels.count(IGNORED))
            writer.finalize()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(
            f"the rows' tokens cannot be written to {str(file.parent)!r} ({reason}): free disk space, or set TMPDIR"
        ) from error
    if bad and not settings.skip_bad_rows:
        shown = "; ".join(f"{row.place}: {row.reason}" for row in bad[:SHOWN])
        others = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{shown}{others}. Repair {'them' if len(bad) > 1 else 'it'}, or pass --skip-bad-rows")
    if not places and bad:
        raise DataError(f"{', '.join(sources)}: no row is left: all {len(bad)} cannot be used, e.g. {bad[0].reason}")
    skipped += bad
    return ExampleRows(Dataset.from_file(str(file)), places, lengths, learned)


def hold_out(
    examples: ExampleRows, share: float, seed: int, groups: Sequence[Hashable] | None = None
) -> tuple[ExampleRows, ExampleRows]:
    """Split examples into those to train on and, by chance, a share to validate on; rows of a group stay together."""
    if not share:
        return examples, examples.select([])
    groups = range(len(examples)) if groups is None else groups
    known = list(dict.fromkeys(groups))
    count = max(1, round(len(known) * share))
    if count >= len(known):
        together = f" (of {len(known)} different prompts)" if len(known) < len(examples) else ""
        raise DataError(
            f"validation={share}: that holds out all {len(examples)} rows{together}: pass a smaller share, or more data"
        )
    held = {known[index] for index in random.Random(seed).sample(range(len(known)), count)}  # noqa: S311  not for security
    train, validation = ([i for i, group in enumerate(groups) if (group in held) == of] for of in (False, True))
    return examples.select(train), examples.select(validation)
