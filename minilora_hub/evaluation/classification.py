"""Measure classifiers on labelled rows: accuracy, macro-F1 and the confusion of labels, beside the base.

A base whose head is in the adapter has no classes of its own. Beside such an adapter stands the most frequent label of
the rows, given to all of them; the notes say so.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minilora_hub.adapter_folder.folders import read_source
from minilora_hub.adapter_folder.results import Evaluation, Part
from minilora_hub.compare.found_adapters import common_base
from minilora_hub.errors import AdapterError, DataError
from minilora_hub.evaluation.metrics import DIGITS, Counts, label_counts, macro_f1, macro_f1_interval, share_interval
from minilora_hub.evaluation.report import command_line, of_split, rounded_interval
from minilora_hub.evaluation.settings import Adapter, Settings, find_adapters
from minilora_hub.hub.client import REPO_ID
from minilora_hub.recording.reference import model_class
from minilora_hub.remote_code.few_rows import plain_products
from minilora_hub.training import labelled
from minilora_hub.training.data import Row, read_rows
from minilora_hub.training.labelled_rows import AUTO_CLASSES, WORDS, LabelledEncoder, checked
from minilora_hub.training.models import base_context
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import IGNORED, Example

if TYPE_CHECKING:
    from minilora_hub.bases.resolving import ResolvedBase

ACCURACY, MACRO_F1 = "accuracy", "macro-F1"
MAJORITY = (
    "the base has no head for these labels: beside the adapter stands the most frequent label, {!r}, for all rows"
)
WORDS_NOTE = "each word counts; the intervals are over the rows"


@dataclass(frozen=True)
class Classified:
    """One adapter on the rows.

    Attributes:
        adapter: the adapter.
        labels: the names of its classes.
        references: per row, the number of the right class of each of its items: one, or one a word.
        predictions: the adapter's, in the same order.
        base: the base's, or those of `majority`.
        majority: the label that stands for a base without a head of its own; None for a base that has one.
        rows: the numbers for results.json.
    """

    adapter: Adapter
    labels: tuple[str, ...]
    references: list[list[int]]
    predictions: list[list[int]]
    base: list[list[int]]
    majority: str | None
    rows: tuple[Evaluation, ...] = ()

    def confusion(self) -> list[list[int]]:
        """Return how often each label (row) was taken for each (column)."""
        right_of, said_of = chain.from_iterable(self.references), chain.from_iterable(self.predictions)
        pairs = Counter(zip(right_of, said_of, strict=True))
        numbers = range(len(self.labels))
        return [[pairs[right, said] for said in numbers] for right in numbers]


@dataclass(frozen=True)
class ClassificationReport:
    """Everything that a run has measured; `base_parameters` is the number of parameters of the base."""

    base: ResolvedBase
    fingerprint: str
    base_parameters: int
    models: tuple[Classified, ...]


def measure(
    adapters: Sequence[str | Path],
    data: Sequence[str],
    *,
    base: str | Path | None = None,
    split: str = "test",
    count: int | None = None,
    truncate: bool = False,
    dtype: str = "float32",
    batch_size: int = 64,
    progress: Callable[[str], None] = lambda line: None,
) -> ClassificationReport:
    """Measure adapters for sequence or token classification.

    Args:
        adapters: folders or Hub ids, all on one base.
        data: files of labelled rows, or the id of a data set on the Hub.
        base: that base. Default: the one the adapters name.
        split: of a data set on the Hub.
        count: the first so many rows; None for all.
        truncate: cut rows that are too long at their end.
        dtype: ``"float32"`` or ``"bfloat16"``.
        batch_size: the most rows of a batch.
        progress: called with a line for each adapter.

    Raises:
        AdapterError: an adapter is not a classifier, or cannot be loaded.
        DataError: a row cannot be used; the message names it and the field.
        ValueError: a setting is out of range.
    """
    settings = Settings(tasks=(), count=count, dtype=dtype, batch_size=batch_size)
    if dtype == "int8":
        raise ValueError("dtype='int8': must be float32 or bfloat16 for labelled rows")
    found = find_adapters(adapters)
    resolved, fingerprint = common_base(base, found)
    arguments = [part for name in data for part in ("--data", Path(name).name if Path(name).exists() else name)]
    arguments += ["--split", split] * (not any(Path(name).exists() for name in data))
    arguments += (["--count", str(count)] if count else []) + ["--truncate"] * truncate
    command = command_line(resolved, arguments, settings)
    measured, parameters = [], 0
    for adapter in found:
        progress(f"Measuring {adapter.name} …")
        one, parameters = _measure(adapter, data, split, truncate, settings, resolved)
        measured.append(_with_rows(one, data, split, command))
    return ClassificationReport(resolved, fingerprint, parameters, tuple(measured))


def _measure(
    adapter: Adapter, data: Sequence[str], split: str, truncate: bool, settings: Settings, base: ResolvedBase
) -> tuple[Classified, int]:
    source = read_source(adapter.folder)
    task = next((task for task, name in AUTO_CLASSES.items() if name == source.auto_class), None)
    if task is None:
        raise AdapterError(
            f"{adapter.name}: is for {source.auto_class}; rows with labels measure adapters for "
            f"{' and '.join(AUTO_CLASSES.values())}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, settings.dtype)
    model = model_class(source).from_pretrained(str(source.folder), base_model=str(base.path), dtype=dtype).to(device)
    tokenizer = labelled.load_tokenizer(base, task, source.folder)
    labels = tuple(model.config.id2label[number] for number in sorted(model.config.id2label))
    longest = min(base_context(base), tokenizer.model_max_length)
    encoder = LabelledEncoder(tokenizer, labels, longest, truncate, whose="the adapter's")
    examples = _examples(data, split, settings.count, task, encoder)
    predict = partial(_predictions, examples=examples, collate=labelled.collator(task, tokenizer), task=task)
    references = [[label for label in example.labels if label != IGNORED] for example in examples]
    fresh = bool(model.config.modules_to_save)
    with torch.no_grad(), plain_products():
        said = predict(model.eval(), batch_size=settings.batch_size)
        parameters = sum(p.numel() for p in model.parameters()) - model.num_adapter_parameters()
        plain = model.unload().eval()
        beside = None if fresh else predict(plain, batch_size=settings.batch_size)
    majority = Counter(label for row in references for label in row).most_common(1)[0][0]
    beside = beside or [[majority] * len(row) for row in references]
    name = labels[majority] if fresh else None
    return Classified(adapter, labels, references, said, beside, name), parameters


def _examples(data: Sequence[str], split: str, count: int | None, task: str, encoder: LabelledEncoder) -> list[Example]:
    examples = []
    rows = read_rows(tuple(data), split=split, check=partial(checked, task=task))
    for row in islice(rows, count):
        example = encoder.encode(row) if isinstance(row, Row) else row
        if isinstance(example, BadRow):
            raise DataError(f"{example.place}: {example.reason}")
        examples.append(example)
    return examples


def _predictions(
    model: Any, *, examples: list[Example], collate: Callable[..., Any], task: str, batch_size: int
) -> list[list[int]]:
    """Return the classes of each example's items; rows of similar length share a batch."""
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
    found: list[list[int]] = [[] for _ in examples]
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        rows = [{"input_ids": examples[place].input_ids, "labels": examples[place].labels} for place in places]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        labels = batch.pop("labels")
        said = model(**batch).logits.argmax(-1)
        for place, mine, asked in zip(places, said, labels, strict=True):
            found[place] = mine[asked != IGNORED].tolist() if task == WORDS else [int(mine)]
    return found


def _with_rows(one: Classified, data: Sequence[str], split: str, command: str) -> Classified:
    """Add the numbers for results.json."""
    known = [name for name in data if not Path(name).exists()]
    names = ", ".join(of_split(name, split) if name in known else Path(name).name for name in data)
    counts = label_counts(one.references, one.predictions, len(one.labels))
    beside = label_counts(one.references, one.base, len(one.labels))
    items = sum(map(len, one.references))
    notes = [MAJORITY.format(one.majority)] if one.majority is not None else []
    notes += [WORDS_NOTE] if items != len(one.references) else []
    common: dict[str, Any] = {"n": items, "command": command, "note": "; ".join(notes) or None}
    common |= {"dataset": known[0] if len(known) == 1 and REPO_ID.fullmatch(known[0]) else None}
    accuracy = _numbers("", counts, lambda c: c.accuracy, share_interval)
    accuracy |= _numbers("base_", beside, lambda c: c.accuracy, share_interval)
    f1 = _numbers("", counts, macro_f1, macro_f1_interval) | _numbers("base_", beside, macro_f1, macro_f1_interval)
    parts = tuple(
        Part(label, there, round(counts.f1(number), DIGITS), base_value=round(beside.f1(number), DIGITS))
        for number, label in enumerate(one.labels)
        if (there := counts.support(number))
    )
    rows = (
        Evaluation(names, ACCURACY, **accuracy, **common),
        Evaluation(names, MACRO_F1, **f1, **common, parts=parts),
    )
    return dataclasses.replace(one, rows=rows)


def _numbers(prefix: str, counts: Counts, value: Callable[[Counts], float], interval: Callable[[Counts], Any]) -> Any:
    number = round(value(counts), DIGITS)
    return {f"{prefix}value": number, f"{prefix}interval": rounded_interval(interval(counts), number)}
