"""Read and encode rows with labels: texts with one label each, and lists of words with one tag each.

    text, label      a text and its class: a string, a whole number, or true and false
    tokens, tags     a list of words and the class of each (`ner_tags` is another name of `tags`)

Words are joined by spaces, as the text that a token-classification pipeline will get; the first token of each word
learns its tag. Torch is not imported.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

from minilora_hub.errors import DataError
from minilora_hub.formatting import lone_surrogate
from minilora_hub.training.data import Row
from minilora_hub.training.sources import BadRow
from minilora_hub.training.tokens import IGNORED, Example

TEXTS, WORDS = "text-classification", "token-classification"
AUTO_CLASSES = {TEXTS: "AutoModelForSequenceClassification", WORDS: "AutoModelForTokenClassification"}
"""Task of labelled rows -> the Auto class of its models."""
FIELDS = {TEXTS: ("text", "label"), WORDS: ("tokens", "tags")}
ANSWERS = ("messages", "completion", "conversations", "output", "chosen")
"""Fields of rows that a text is generated from."""


def task_of(fields: dict[str, Any]) -> str | None:
    """Return the task that the fields of a row stand for; None if the row has no labels."""
    if any(fields.get(name) is not None for name in ANSWERS):
        return None
    names_of = _renamed(fields).keys()
    return next((task for task, names in FIELDS.items() if names_of >= set(names)), None)


def checked(place: str, value: Any, task: str) -> Row | BadRow:
    """Return a parsed value as a row of a task, or as a bad row with the reason."""
    try:
        return Row(place, task, _fields(value, task))
    except ValueError as error:
        return BadRow(place, str(error))


def _renamed(value: dict[str, Any]) -> dict[str, Any]:
    fields = {name: content for name, content in value.items() if content is not None}
    if "ner_tags" in fields and "tags" not in fields:
        fields["tags"] = fields.pop("ner_tags")
    return fields


def _fields(value: Any, task: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"is a {type(value).__name__}: each row must be an object with named fields")
    fields, names = _renamed(value), FIELDS[task]
    missing = [name for name in names if name not in fields]
    if missing:
        raise ValueError(f"has no {' and no '.join(missing)}, which {task} needs; it has {sorted(fields)}")
    first, second = (fields[name] for name in names)
    if task == TEXTS:
        if not isinstance(first, str) or not first.strip():
            raise ValueError("text is empty" if isinstance(first, str) else f"text is a {type(first).__name__}")
        _require_label("label", second)
    else:
        for name, cells in zip(names, (first, second), strict=True):
            if not isinstance(cells, list) or not cells:
                raise ValueError(f"{name} must be a list with something in it, got {str(cells)[:60]!r}")
        if len(first) != len(second):
            raise ValueError(f"tags: has {len(second)} entries for {len(first)} tokens")
        for number, (word, tag) in enumerate(zip(first, second, strict=True), 1):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"tokens, entry {number}: must be a word, got {word!r}")
            _require_label(f"tags, entry {number}", tag)
    kept = {name: fields[name] for name in names}
    if surrogate := lone_surrogate(kept):
        raise ValueError(f"contains a lone surrogate, {surrogate}, which no tokenizer can encode: repair the text")
    return kept


def _require_label(name: str, label: Any) -> None:
    if not isinstance(label, (str, int)) or label == "":
        got = "an empty text" if label == "" else f"a {type(label).__name__} ({str(label)[:40]})"
        raise ValueError(f"{name}: must be a class (a text, a whole number, true or false), got {got}")


def name_of(label: Any) -> str:
    """Return a label as it is called in the model's configuration."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def labels_of(rows: Iterable[Row | BadRow], known: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of the labels of rows, in the order of their ids.

    Args:
        rows: rows of labelled data.
        known: the base's own labels, in their order, which is kept where they are these labels.

    Raises:
        DataError: there are fewer than two, or some are texts and some numbers.
    """
    seen: dict[Any, str] = {}
    bad: list[BadRow] = []
    for row in rows:
        if isinstance(row, BadRow):
            bad = bad or [row]
        else:
            given = row.fields[FIELDS[row.kind][1]]
            for label in given if isinstance(given, list) else [given]:
                seen.setdefault((type(label), label), row.place)
    kinds = {kind: place for (kind, _), place in seen.items()}
    if len(kinds) > 1:
        (one, at), (other, there) = list(kinds.items())[:2]
        raise DataError(f"{there}: has a label that is a {other.__name__}, the one of {at} is a {one.__name__}")
    names = tuple(name_of(label) for _, label in sorted(seen, key=lambda pair: pair[1]))
    if len(names) < 2 and bad:
        raise DataError(f"{bad[0].place}: {bad[0].reason}")
    if len(names) < 2:
        raise DataError(f"the rows have {len(names)} label{'s' * (len(names) != 1)} {list(names)}: needed are two")
    known = tuple(known)
    return known if set(known) == set(names) else names


class LabelledEncoder:
    """Converts labelled rows to examples; their `labels` are ids of classes.

    Args:
        tokenizer: the base's; a fast one, where words are labelled.
        labels: the names of the classes.
        max_length: maximum tokens in a row.
        truncate: cut longer rows at their end; otherwise they are bad rows.
        whose: what an error calls the labels.
    """

    def __init__(
        self, tokenizer: Any, labels: tuple[str, ...], max_length: int, truncate: bool = False, whose: str = ""
    ) -> None:
        self.whose = whose or "the training rows'"
        self.tokenizer, self.max_length, self.truncate = tokenizer, max_length, truncate
        self.ids = {name: number for number, name in enumerate(labels)}

    def encode(self, row: Row) -> Example | BadRow:
        """Tokenize a row, or return it as a bad row with the reason."""
        words = row.kind == WORDS
        text = " ".join(row.fields["tokens"]) if words else row.fields["text"]
        cut = {"truncation": True, "max_length": self.max_length} if self.truncate else {}
        encoded = self.tokenizer(text, return_offsets_mapping=words, verbose=False, **cut)
        ids = encoded["input_ids"]
        if len(ids) > self.max_length:
            return BadRow(row.place, f"has {len(ids)} tokens, the most is {self.max_length}: shorten it, or --truncate")
        given = row.fields["tags"] if words else [row.fields["label"]]
        for label in given:
            if name_of(label) not in self.ids:
                return BadRow(row.place, f"the label {label!r} is not one of {self.whose}, {list(self.ids)}")
        classes = [self.ids[name_of(label)] for label in given]
        if not words:
            return Example(row.place, ids, classes)
        starts = [0, *accumulate(len(word) + 1 for word in row.fields["tokens"])]
        labels, before = [], -1
        for start, end in encoded["offset_mapping"]:
            word = bisect_right(starts, end - 1) - 1 if end > start else before  # by its end: a start may be a space
            labels.append(classes[word] if word != before else IGNORED)
            before = word
        learned = len(labels) - labels.count(IGNORED)
        if learned != len(classes) and not self.truncate:
            return BadRow(row.place, f"{len(classes) - learned} of its tokens disappear in the base's tokenizer")
        if not learned:
            return BadRow(row.place, "has no token with a label after truncation")
        return Example(row.place, ids, labels)
