"""What the page remembers of a visitor while they are here: what was run for them, and what became of it. No Gradio.

Nothing of it is stored: it goes when the visitor leaves. A vote or a share is about what is kept here, never about what
a browser sends.
"""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from minilora_hub.demo.runs.comparison import Record
from minilora_hub.demo.runs.limits import whole_number
from minilora_hub.demo.votes.sharing import SharedComparisons
from minilora_hub.demo.votes.votes import ALL_BAD, TIE, VoteStore, vote_on
from minilora_hub.errors import PageError

KEPT, VISITORS = 20, 1000


@dataclass(frozen=True)
class KeptLimits:
    """How much memory comparisons may take that are kept for visitors: those of one, and those of all together.

    The last one of a visitor is kept in any case.
    """

    visitor_bytes: int = 50 * 10**6
    total_bytes: int = 500 * 10**6

    @classmethod
    def from_environment(cls) -> KeptLimits:
        """Read MINILORA_KEPT_MEGABYTES, for all visitors together; one may take a tenth of it.

        Raises:
            ValueError: it is no whole number of at least 1.
        """
        total = whole_number("MINILORA_KEPT_MEGABYTES", cls.total_bytes // 10**6) * 10**6
        return cls(total // 10, total)


@dataclass
class Kept:
    """A comparison that was run for a visitor.

    Attributes:
        record: what it is.
        order: of a blind one, the index of the column under each letter; None if it was not blind.
        id: of this comparison, random.
        closed: why it cannot be voted on (any more); None while it can.
        shared: its id in the store of shared comparisons, None if it was not shared.
        bytes: of memory that it takes.
    """

    record: Record
    order: tuple[int, ...] | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    closed: str | None = None
    shared: str | None = None
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        """Measure it."""
        self.bytes = self.record.memory


@dataclass
class _Visit:
    """What is kept of one visitor: what was run for them, the oldest first, and what they look at."""

    kept: list[Kept] = field(default_factory=list)
    shown: Kept | None = None

    @property
    def bytes(self) -> int:
        everything = [*self.kept, *([self.shown] if self.shown else [])]
        return sum({one.id: one.bytes for one in everything}.values())

    def make_room(self, limit: int) -> None:
        """Let the oldest go that are neither the last one nor looked at, until the others take `limit` bytes."""
        for oldest in self.kept[:-1]:
            if self.bytes <= limit:
                return
            if oldest is not self.shown:
                self.kept = [one for one in self.kept if one is not oldest]


class Visits:
    """The visitors, each with the last comparisons that were run for them.

    Args:
        votes: where votes go.
        shared: where shared comparisons go.
        limits: how much memory the comparisons may take.
    """

    def __init__(self, votes: VoteStore, shared: SharedComparisons, limits: KeptLimits | None = None) -> None:
        """Start without visitors."""
        self.votes, self.shared, self.limits = votes, shared, limits or KeptLimits()
        self._visits: OrderedDict[str, _Visit] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, visitor: str, record: Record, order: tuple[int, ...] | None = None) -> Kept:
        """Remember a comparison that has ended; this visitor's oldest, or who was here longest ago, makes room."""
        kept = Kept(record, order)
        if order is None:
            kept.closed = "only a blind comparison is voted on"
        elif not record.complete:
            kept.closed = "an answer was stopped or failed: run it again to vote"
        with self._lock:
            visit = self._visit_of(visitor)
            for older in visit.kept:
                older.closed = older.closed or "a newer comparison was run"
            visit.kept.append(kept)
            del visit.kept[:-KEPT]
            visit.shown = kept
            self._make_room(visit)
        return kept

    def _visit_of(self, visitor: str) -> _Visit:
        """Return what is kept of a visitor who is here now."""
        visit = self._visits.setdefault(visitor, _Visit())
        self._visits.move_to_end(visitor)
        return visit

    def _make_room(self, current: _Visit) -> None:
        """Forget what is beyond the limits: of the current visitor, then whole visitors, the longest absent first."""
        current.make_room(min(self.limits.visitor_bytes, self.limits.total_bytes))
        total = sum(visit.bytes for visit in self._visits.values())
        while len(self._visits) > 1 and (len(self._visits) > VISITORS or total > self.limits.total_bytes):
            total -= self._visits.popitem(last=False)[1].bytes

    def show(self, visitor: str, kept: Kept) -> None:
        """Remember that a visitor looks at this one: from the history, or one that somebody shared."""
        with self._lock:
            visit = self._visit_of(visitor)
            for one in visit.kept:
                one.closed = one.closed or "another comparison was opened"
            visit.shown = kept
            self._make_room(visit)

    def shown(self, visitor: str) -> Kept:
        """Return what a visitor looks at.

        Raises:
            PageError: nothing was run, or its names are still hidden.
        """
        with self._lock:
            visit = self._visits.get(visitor)
            kept = visit.shown if visit else None
        if kept is None:
            raise PageError("nothing was run yet")
        if not kept.closed:
            raise PageError("vote first: it would show the names")
        return kept

    def history(self, visitor: str) -> list[Kept]:
        """Return what was run for a visitor, the newest first; what is still to be voted on is not among it."""
        with self._lock:
            visit = self._visits.get(visitor)
            kept = [*visit.kept] if visit else []
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
            visit = self._visits.get(visitor)
            if visit and visit.kept:
                return visit.kept[-1]
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
            self._visits.pop(visitor, None)
