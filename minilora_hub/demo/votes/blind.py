"""Blind comparisons: columns shuffled and renamed, and nothing on the page that tells which is which. No Gradio.

The order never leaves the server before the vote: what the browser gets is a stage from which everything else was
taken out, so there is nothing to be found in its memory.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from minilora_hub.demo.ui.page_state import Frame, texts_only

LETTERS = "ABCDEFGHI"


def shuffled(amount: int) -> tuple[int, ...]:
    """Draw an order: for each letter, A first, the index of the column under it."""
    return tuple(random.SystemRandom().sample(range(amount), amount))


class Blindfold:
    """Hides one comparison, frame after frame.

    A column tells its text and its state. Not its speed, its tokens' probabilities, its experts or its error: each of
    them can give away the method.

    Args:
        order: for each letter, A first, the index of the column under it.
    """

    def __init__(self, order: tuple[int, ...]) -> None:
        """Start with nothing read; see the class."""
        self.order = order
        self._read = [0] * len(order)
        self._logs = [""] * len(order)

    def frame(self, frame: Frame) -> Frame:
        """Return a frame of the comparison as a blind one."""
        return replace(frame, stage=self.stage(frame.stage))

    def stage(self, stage: dict[str, Any]) -> dict[str, Any]:
        """Return a stage in this order, with letters for names and nothing but the texts."""
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
                    **{"tokens": 0, "first": None, "rate": None, "step": None},
                }
            )
        shown = {"run": stage["run"], "prompt": stage["prompt"], "sampling": None, "replay": None}
        return {**shown, "blind": True, "columns": columns}

    def _texts(self, index: int, log: str) -> str:
        # Only what is new is read: a frame comes many times a second, and logs grow long.
        end = log.rfind("\n") + 1
        self._logs[index] += texts_only(log[self._read[index] : end])
        self._read[index] = end
        return self._logs[index]


def revealed(stage: dict[str, Any], order: tuple[int, ...]) -> dict[str, Any]:
    """Return a stage in its own order, with each column's letter in front of its badge."""
    letters = {index: letter for letter, index in zip(LETTERS, order, strict=False)}
    columns = [
        {**column, "about": {**column["about"], "letter": letters[index]}}
        for index, column in enumerate(stage["columns"])
    ]
    return {**stage, "columns": columns}
