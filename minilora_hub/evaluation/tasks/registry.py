"""The four evaluation tasks, made from the data of other libraries (extra `eval`)."""

from __future__ import annotations

import re
from functools import cache

from minilora_hub.evaluation.tasks import dates, inflection, numbers, records
from minilora_hub.evaluation.tasks.items import SPLITS, Item, Task

__all__ = ["SPLITS", "TASKS", "Item", "Task"]


def _make_inflection(split: str) -> tuple[Item, ...]:
    return inflection.make(split, _words_in_training())


@cache
def _words_in_training() -> frozenset[str]:
    """Return the words of all training prompts and answers, which must not be test words of inflection."""
    items = [item for task in OTHERS for item in task.items("train")]
    texts = [f"{item.prompt} {item.completion}" for item in items] + [
        item.prompt.partition(":")[0] for item in inflection.make("train")
    ]
    return frozenset(word for text in texts for word in re.findall(r"\w+", text.lower()))


OTHERS = (
    Task("dates", "Dates in words, as YYYY-MM-DD", "exact", dates.make),
    Task("numbers", "Numbers in words, as digits and back", "exact", numbers.make),
    Task("records", "Sentences, as JSON records", "json", records.make),
)
TASKS = {
    task.name: task
    for task in (
        OTHERS[0],
        OTHERS[1],
        Task("inflection", "English words, in another form", "exact", _make_inflection),
        OTHERS[2],
    )
}
"""Every task by its name."""
