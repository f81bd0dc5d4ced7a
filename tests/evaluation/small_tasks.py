"""Two small tasks that no library is needed for, in the place of the real ones."""

from __future__ import annotations

import json

import pytest

from minilora_hub.evaluation.tasks.items import Item, Task

SIZES = {"train": 7, "validation": 3, "test": 11, "held_out": 2}


def echo(split: str) -> tuple[Item, ...]:
    """Prompts of different lengths; the first answer is long, so that it sets the limit."""
    return tuple(
        Item(
            "echo",
            split,
            f"{split} {line} {'ab' * (1 + line % 4)}",
            "x" * (9 if line == 0 else 1 + line % 3),
            1 + line % 2,
            "",
        )
        for line in range(SIZES[split])
    )


def record(split: str) -> tuple[Item, ...]:
    return tuple(
        Item("record", split, f"{split} number {line}", json.dumps({"n": line}), 1, "")
        for line in range(SIZES[split] - 1)
    )


TASKS = {"echo": Task("echo", "Say it again", "exact", echo), "record": Task("record", "As a record", "json", record)}


@pytest.fixture
def small_tasks(monkeypatch):
    monkeypatch.setattr("minilora_hub.evaluation.tasks.registry.TASKS", TASKS)
    return TASKS
