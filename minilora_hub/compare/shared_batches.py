"""Let streams that answer at the same time share forwards: their rows join one batch once their prompts are read.

Each stream advances in the thread of its caller. Whichever is advanced first computes a step for every row of the
batch; the updates of the others' rows wait until they are advanced. Prompts are read in a batch of each stream's own,
so that a long one delays the others by one piece at a time. Where rows cannot be joined (see `DecodingBatch.can_join`),
or would need much padding, there are several batches, which take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Answer, Update
from minilora_hub.compare.batch import Batch, Taken


class Step(NamedTuple):
    """What happened in a stream since it was last advanced.

    Attributes:
        forwards: forward passes of the base that computed rows of this stream.
        updates: those of its rows, step by step.
        shared: whether other streams computed this, and there is more to come: it is their turn again.
    """

    forwards: int
    updates: list[Update]
    shared: bool = False


@dataclass(eq=False)
class Share:
    """The rows of one stream in a batch.

    Attributes:
        answers: the rows.
        stop: ends all of them when it is set.
        halted: indices of rows to be ended.
        batch: the batch that they are in.
        joins: whether others may join it: its prompts are read.
        forwards: see `Step`; those that the stream has not seen.
        updates: those that the stream has not seen.
        closed: whether nobody will ask for updates again.
    """

    answers: Sequence[Answer]
    stop: threading.Event
    halted: Collection[int]
    batch: Batch
    joins: bool = False
    forwards: int = 0
    updates: list[Update] = field(default_factory=list)
    closed: bool = False

    @property
    def finished(self) -> bool:
        """Whether every row has ended and its updates were seen; read it with the engine's lock."""
        return not self.updates and all(answer.finished for answer in self.answers)

    def has_ended(self, answer: Answer) -> bool:
        """Return whether a row is to be ended from outside."""
        return self.closed or self.stop.is_set() or answer.index in self.halted


class SharedBatches:
    """The batches of all streams of an engine. The caller of `step` holds the engine's lock.

    Args:
        bank: the models.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._shares: list[Share] = []  # one operation at a time is atomic, so any thread may add one

    def add(self, answers: Sequence[Answer], stop: threading.Event, halted: Collection[int]) -> Share:
        """Add the rows of a stream, whose adapters it holds with `bank.use` until the share is closed. Thread-safe."""
        share = Share(answers, stop, halted, Batch(self._bank, answers))
        self._shares.append(share)
        return share

    def step(self, share: Share) -> Step:
        """Return what a stream has not seen; if that is nothing, compute a step of its batch first."""
        self.leave()
        batch = share.batch
        computes = not share.updates and not batch.finished
        if computes:
            for each in self._in(batch):
                each.forwards += 1
            taken = batch.step()
            self._deliver(batch, taken)
            if taken and not share.joins:
                self._join(share)
        forwards, updates = share.forwards, share.updates
        share.forwards, share.updates = 0, []
        return Step(forwards, updates, not (computes or share.finished))

    def _in(self, batch: Batch) -> list[Share]:
        return [share for share in self._shares if share.batch is batch]

    def leave(self) -> None:
        """End rows that were stopped or that nobody reads any more."""
        for share in [*self._shares]:
            gone = [answer for answer in share.answers if share.has_ended(answer)]
            self._deliver(share.batch, share.batch.end(gone))
            if share.closed or all(answer.finished for answer in share.answers):
                self._shares.remove(share)

    def _deliver(self, batch: Batch, taken: Sequence[Taken]) -> None:
        for share in self._in(batch):
            updates = [update for answer, update in taken if answer in share.answers]
            share.updates += sorted(updates, key=lambda update: update.row)

    def _join(self, share: Share) -> None:
        """Put the rows of a stream, whose prompts were read, into the batch of others if they fit."""
        others = dict.fromkeys(each.batch for each in self._shares if each.joins)
        share.joins = True
        fits = (other for other in others if not other.finished and not share.batch.finished)
        for other in fits:
            if other.can_join(share.batch):
                joined, share.batch = share.batch, other
                try:
                    other.join(joined)
                except Exception as error:  # too little memory: the rows may be joined in part
                    for batch in (joined, other):
                        message = f"{type(error).__name__}: {error}"
                        self._deliver(other, batch.end(None, "error", message))
                return
