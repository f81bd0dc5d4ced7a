"""Blind comparisons: columns shuffled and renamed, and nothing on the page that tells which is which. No Gradio.

The order never leaves the server before the vote: what the browser gets is a stage from which everything else was
taken out, so there is nothing to be found in its memory.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from minilora_hub.demo.frames import Frame

LETTERS = "ABCDEFGHI"
SHOWN = ("state", "text")
"""What a blind column tells. Not its speed, tokens, experts or error: each of them can give away the method."""


def shuffled(amount: int) -> tuple[int, ...]:
    """Draw an order: for each letter, A first, the index of the column under it."""
    return tuple(random.SystemRandom().sample(range(amount), amount))


def blinded(stage: dict[str, Any], order: tuple[int, ...]) -> dict[str, Any]:
    """Return a stage in this order, with letters for names and nothing but the texts."""
    columns = []
    for letter, index in zip(LETTERS, order, strict=False):
        column = stage["columns"][index]
        about = {"name": f"Answer {letter}", "kind": "blind", "badge": letter, "facts": ""}
        told = {name: column[name] for name in SHOWN}
        hidden = {"tokens": 0, "first": None, "rate": None, "step": None}
        error = "This answer failed." if column["error"] else None
        columns.append({"about": about, **hidden, **told, "error": error})
    return {"run": stage["run"], "prompt": stage["prompt"], "blind": True, "columns": columns}


def blinded_frame(frame: Frame, order: tuple[int, ...]) -> Frame:
    """Return a frame of a running comparison as a blind one."""
    return replace(frame, stage=blinded(frame.stage, order))


def revealed(stage: dict[str, Any], order: tuple[int, ...]) -> dict[str, Any]:
    """Return a stage in its own order, with each column's letter in front of its badge."""
    letters = {index: letter for letter, index in zip(LETTERS, order, strict=False)}
    columns = [
        {**column, "about": {**column["about"], "letter": letters[index]}}
        for index, column in enumerate(stage["columns"])
    ]
    return {**stage, "columns": columns}
