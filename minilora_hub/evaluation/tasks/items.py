"""Items of tasks, their splits, and the random draws that make them.

Items are generated, not stored. They are the same on every machine and Python version: every draw is one of
`random.Random`'s stable methods, seeded with a text, and a split is a hash of the entity. The data of the libraries may
change with their versions; a test compares a hash of each task's items.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, TypeVar

from minilora_hub.errors import MissingExtraError

T = TypeVar("T")
SPLITS = ("train", "validation", "test", "held_out")
"""`held_out` items are made of test entities, in a format that occurs in no other split."""


@dataclass(frozen=True)
class Item:
    """A question and its one right answer.

    Args:
        task: the name of its task.
        split: one of `SPLITS`.
        prompt: the user's text.
        completion: the exact answer.
        difficulty: 1 (a change of notation), 2 (one more fact to know) or 3 (several steps, or irregular).
        entity: it determines the split: no entity occurs in two splits, except in test and held_out.
        labels: keys by which results may be grouped, e.g. ``{"format": "de long"}``.
    """

    task: str
    split: str
    prompt: str
    completion: str
    difficulty: int
    entity: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A task: its items by split, and how an answer is scored.

    Args:
        name: as in ``minilora eval --task``.
        title: for tables and cards.
        kind: ``"exact"``: the text is compared; ``"json"``: also the fields of the JSON value.
        make: makes all items of a split, in an order that mixes difficulties.
    """

    name: str
    title: str
    kind: Literal["exact", "json"]
    make: Callable[[str], tuple[Item, ...]] = field(repr=False)

    @cached_property
    def _made(self) -> dict[str, tuple[Item, ...]]:
        return {}

    def items(self, split: str, count: int | None = None) -> tuple[Item, ...]:
        """Return the first `count` items of a split, or all.

        Args:
            split: one of `SPLITS`.
            count: number of items.

        Raises:
            ValueError: there is no such split, or it has fewer items.
            MissingExtraError: a library that makes the items is not installed.
        """
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {', '.join(SPLITS)}")
        if split not in self._made:
            self._made[split] = self.make(split)
        made = self._made[split]
        if count is not None and not 1 <= count <= len(made):
            raise ValueError(f"count={count}: must be between 1 and {len(made)}, all that {self.name} has for {split}")
        return made[:count]


def entity_split(entity: str) -> str:
    """Return train, validation or test, by a hash of the entity: 80, 5 and 15 of 100."""
    place = int.from_bytes(hashlib.sha256(entity.encode()).digest()[:8], "big") % 100
    return "train" if place < 80 else "validation" if place < 85 else "test"


def entities_of(split: str) -> str:
    """Return the split whose entities the items of a split are made of."""
    return "test" if split == "held_out" else split


class Draw:
    """Random draws for one task and split; the same on every machine."""

    def __init__(self, task: str, split: str) -> None:
        self._rng = random.Random(f"{task}/{split}")  # noqa: S311  (data, not secrets)

    def one(self, values: Sequence[T]) -> T:
        """Draw one value, each with equal probability."""
        return values[self._rng.randrange(len(values))]

    def number(self, low: int, high: int) -> int:
        """Draw an integer from low to high, both included."""
        return low + self._rng.randrange(high - low + 1)

    def shuffled(self, values: Iterable[T]) -> list[T]:
        """Return all values in a random order."""
        left = list(values)
        return [left.pop(self._rng.randrange(len(left))) for _ in range(len(left))]


def distinct(make: Callable[[], Item | None], count: int) -> tuple[Item, ...]:
    """Call `make` until there are `count` items with different prompts; it returns None for a draw to discard."""
    found: dict[str, Item] = {}
    for _ in range(1000 * count):
        item = make()
        if item is not None:
            found.setdefault(item.prompt, item)
        if len(found) == count:
            return tuple(found.values())
    raise RuntimeError(f"only {len(found)} of {count} items could be made")


def library(name: str) -> Any:
    """Import a library that makes items.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        if error.name != package:
            raise
        raise MissingExtraError(package, "eval") from error
