"""Blind comparisons: columns in a random order, without names. No Gradio.

The order stays on the server until the vote. The browser receives the texts only, so names cannot be read from its
memory.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from minilora_hub.demo.ui.page_state import Frame, texts_only, with_html

LETTERS = "ABCDEFGHI"


def shuffled(count: int) -> tuple[int, ...]:
    """Draw a random order: for each letter, A first, the index of the column under it."""
    return tuple(random.SystemRandom().sample(range(count), count))


class Blindfold:
    """Removes identifying data from the frames of one comparison.

    A column keeps its text and its state. Speed, probabilities, experts and error messages are removed, since each of
    them can reveal the method.

    Args:
        order: for each letter, A first, the index of the column under it.
    """

    def __init__(self, order: Iterable[int]) -> None:
        self.order = tuple(order)
        self._read = [0] * len(self.order)
        self._logs = [""] * len(self.order)

    def frame(self, frame: Frame) -> Frame:
        """Return the blind version of a frame."""
        return replace(frame, stage=self.stage(frame.stage))

    def stage(self, stage: dict[str, Any]) -> dict[str, Any]:
        """Return the blind version of a stage: in this order, with letters instead of names."""
        columns = []
        for letter, index in zip(LETTERS, self.order, strict=False):
            column = stage["columns"][index]
            nothing = {"adapter": None, "facts": "", "experts": 0, "solo": None}
            columns.append(
                {
                    "about": {"name": f"Answer {letter}", "kind": letter, "badge": letter, **nothing},
                    "state": column["state"],
                    "log": self._texts(index, column["log"]),
                    "error": "This answer failed." if column["error"] else None,
                    **{"tokens": 0, "first": None, "rate": None, "step": None, "right": None},
                    **{"html": column.get("html"), "before": []},
                }
            )
        shown = {"run": stage["run"], "prompt": stage["prompt"], "sampling": None, "replay": None, "expected": None}
        return {**shown, "blind": True, "columns": columns}

    def _texts(self, index: int, log: str) -> str:
        # Parse only the appended part: there are many frames per second, and logs grow long.
        end = log.rfind("\n") + 1
        self._logs[index] += texts_only(log[self._read[index] : end])
        self._read[index] = end
        return self._logs[index]


def revealed(stage: dict[str, Any], order: tuple[int, ...]) -> dict[str, Any]:
    """Return a stage in its original order, with each column's letter before its badge."""
    letters = {index: letter for letter, index in zip(LETTERS, order, strict=False)}
    columns = [
        {**column, "about": {**column["about"], "letter": letters[index]}}
        for index, column in enumerate(with_html(stage)["columns"])
    ]
    return {**stage, "columns": columns}
