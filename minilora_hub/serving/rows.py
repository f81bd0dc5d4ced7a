"""Rows that a scheduler runs, and its report of what there is to do."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field

from minilora_hub.compare.answer import Answer, Update


@dataclass(eq=False)
class ServedRow:
    """A row that a request waits for.

    Attributes:
        answer: its state.
        limit: the most tokens it generates.
        deliver: called with each update, in the thread that computes; must return at once.
        started: when it was submitted, by `time.perf_counter`.
        bounded: whether it counts towards the bounds of the server; rows of the page have a queue of their own.
        stopped: asked before every step whether the row is to end.
        stepped: called after each step that computed tokens of the row, once for all rows that have the same; see
            `deliver`.
        cancelled: whether its client has left.
        status: HTTP status of its error, if it ends with one.
        number: order in which it was submitted.
        first: whether it is the first of its request.
        key: its name in the manager; rows are sorted by it.
        space: whose its tokens are in the manager; see `TokenSpaces`.
        version: of its adapter's files when it was submitted; None where it shares nothing.
        running: whether it has been part of a step.
        held: keeps its adapter from being unloaded while it waits, and in memory while it runs.
    """

    answer: Answer
    limit: int
    deliver: Callable[[Update], None]
    started: float = field(default_factory=time.perf_counter)
    bounded: bool = True
    stopped: Callable[[], bool] = lambda: False
    stepped: Callable[[], None] = lambda: None
    cancelled: bool = False
    status: int = 500
    number: int = 0
    first: bool = False
    key: str = ""
    space: int = 0
    version: Hashable | None = None
    running: bool = False
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def adapter(self) -> str | None:
        """The adapter's name in the bank; None for the base."""
        return self.answer.row.adapter


@dataclass(frozen=True)
class Load:
    """What a scheduler has to do.

    Attributes:
        running: rows in a batch.
        waiting: rows that wait.
        cache_bytes: size of the keys and values of all rows.
        steps: forwards since the start.
        rows_computed: rows of all steps that gave tokens, so that the mean batch is ``rows_computed / steps``.
    """

    running: int
    waiting: int
    cache_bytes: int
    steps: int
    rows_computed: int
