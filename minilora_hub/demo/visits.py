"""What the page remembers of a visitor while they are here: what was run for them, and what became of it. No Gradio.

Nothing of it is stored: it goes when the visitor leaves. A vote or a share is about what is kept here, never about what
a browser sends.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from minilora_hub.demo.record import Record
from minilora_hub.demo.sharing import SharedComparisons
from minilora_hub.demo.votes import ALL_BAD, TIE, VoteStore, vote_on
from minilora_hub.errors import PageError

KEPT, VISITORS = 20, 1000


@dataclass
class Kept:
    """A comparison that was run for a visitor.

    Attributes:
        record: what it is.
        order: of a blind one, the index of the column under each letter; None if it was not blind.
        id: of this comparison, random.
        closed: why it cannot be voted on (any more); None while it can.
        shared: its id in the store of shared comparisons, None if it was not shared.
    """

    record: Record
    order: tuple[int, ...] | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    closed: str | None = None
    shared: str | None = None


class Visits:
    """The visitors, each with the last comparisons that were run for them.

    Args:
        votes: where votes go.
        shared: where shared comparisons go.
    """

    def __init__(self, votes: VoteStore, shared: SharedComparisons) -> None:
        """Start without visitors."""
        self.votes, self.shared = votes, shared
        self._kept: OrderedDict[str, list[Kept]] = OrderedDict()
        self._shown: dict[str, Kept] = {}
        self._lock = threading.Lock()

    def keep(self, visitor: str, record: Record, order: tuple[int, ...] | None = None) -> Kept:
        """Remember a comparison that has ended; the oldest of this visitor, or of the visitors, makes room."""
        kept = Kept(record, order)
        if order is None:
            kept.closed = "only a blind comparison is voted on"
        elif not record.complete:
            kept.closed = "an answer was stopped or failed: run it again to vote"
        with self._lock:
            mine = self._kept.setdefault(visitor, [])
            self._kept.move_to_end(visitor)
            for older in mine:
                older.closed = older.closed or "a newer comparison was run"
            mine.append(kept)
            del mine[:-KEPT]
            self._shown[visitor] = kept
            while len(self._kept) > VISITORS:
                self._shown.pop(self._kept.popitem(last=False)[0], None)
        return kept

    def show(self, visitor: str, kept: Kept) -> None:
        """Remember that a visitor looks at this one: from the history, or one that somebody shared."""
        with self._lock:
            for one in self._kept.setdefault(visitor, []):
                one.closed = one.closed or "another comparison was opened"
            self._shown[visitor] = kept

    def shown(self, visitor: str) -> Kept:
        """Return what a visitor looks at.

        Raises:
            PageError: nothing was run, or its names are still hidden.
        """
        with self._lock:
            kept = self._shown.get(visitor)
        if kept is None:
            raise PageError("nothing was run yet")
        if not kept.closed:
            raise PageError("vote first: it would show the names")
        return kept

    def history(self, visitor: str) -> list[Kept]:
        """Return what was run for a visitor, the newest first; what is still to be voted on is not among it."""
        with self._lock:
            kept = [*self._kept.get(visitor, ())]
        return [one for one in reversed(kept) if one.closed]

    def find(self, visitor: str, identifier: str) -> Kept:
        """Return one comparison of a visitor's.

        Raises:
            PageError: it is none of theirs, or no longer kept.
        """
        for one in self.history(visitor):
            if one.id == identifier:
                return one
        raise PageError("this comparison is no longer kept: run it again")

    def last(self, visitor: str) -> Kept:
        """Return what was run for a visitor last.

        Raises:
            PageError: nothing was.
        """
        with self._lock:
            if self._kept.get(visitor):
                return self._kept[visitor][-1]
        raise PageError("nothing was run yet")

    def vote(self, visitor: str, choice: str) -> Kept:
        """Store a visitor's vote on their last comparison: a letter's number from 0 on, `TIE` or `ALL_BAD`.

        Raises:
            PageError: it cannot be voted on (again), or the vote cannot be stored.
        """
        kept = self._close(self.last(visitor), "you have voted on this comparison")
        try:
            if choice in (TIE, ALL_BAD):
                chosen: int | str = choice
            elif kept.order is not None and choice in map(str, range(len(kept.order))):
                chosen = kept.order[int(choice)]
            else:
                raise PageError(f"choice={choice[:20]!r}: there is no such answer")
            self.votes.add(vote_on(kept.record, kept.id, kept.order or (), chosen))
        except BaseException:
            kept.closed = None  # nothing was stored: it can be tried again
            raise
        return kept

    def give_up(self, visitor: str) -> Kept:
        """Show the names without a vote; there is none on this comparison then.

        Raises:
            PageError: nothing was run, or the names are already shown.
        """
        return self._close(self.last(visitor), "the names were shown before a vote")

    def _close(self, kept: Kept, why: str) -> Kept:
        with self._lock:
            if kept.closed:
                raise PageError(kept.closed)
            kept.closed = why
        return kept

    def share(self, kept: Kept) -> str:
        """Store a comparison for everybody who has its link; once, however often it is asked for.

        Raises:
            PageError: its names are still hidden, or it cannot be stored.
        """
        if not kept.closed:
            raise PageError("vote first: a shared comparison shows the names")
        if kept.shared is None:
            kept.shared = self.shared.add(kept.record)
        return kept.shared

    def forget(self, visitor: str) -> None:
        """Forget a visitor who left."""
        with self._lock:
            self._kept.pop(visitor, None)
            self._shown.pop(visitor, None)
