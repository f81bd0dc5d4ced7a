"""The comparisons that are kept for one visitor: the last ones, and the one that the page shows. No Gradio."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from minilora_hub.demo.runs.comparison import Comparison
from minilora_hub.errors import PageError

MOST_KEPT = 20


@dataclass
class KeptComparison:
    """A comparison that was run for a visitor, or one that somebody shared.

    Attributes:
        comparison: its content.
        order: of a blind one, the index of the column under each letter; None if it was not blind.
        closed: why it cannot be voted on; None while it can.
        shared: its id among the shared comparisons; None if it is not one of them.
        id: random.
    """

    comparison: Comparison
    order: tuple[int, ...] | None = None
    closed: str | None = None
    shared: str | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))


class History:
    """At most `MOST_KEPT` comparisons, the oldest first. Only the last one can be voted on."""

    def __init__(self) -> None:
        self._kept: list[KeptComparison] = []
        self._shown: KeptComparison | None = None

    @property
    def memory(self) -> int:
        """Bytes of memory that the comparisons take."""
        return sum({one.id: one.comparison.memory for one in (*self._kept, self._shown) if one}.values())

    def make_room(self, limit: float) -> None:
        """Forget the oldest until `limit` bytes are enough; the last one and the one that is shown stay."""
        for oldest in self._kept[:-1]:
            if self.memory <= limit:
                return
            if oldest is not self._shown:
                self._kept.remove(oldest)

    def clear(self) -> None:
        """Forget all."""
        self._kept, self._shown = [], None

    def add(self, comparison: Comparison, order: tuple[int, ...] | None = None) -> KeptComparison:
        """Keep a comparison that has ended, and show it; `order` is that of a blind one."""
        kept = KeptComparison(comparison, order)
        if order is None:
            kept.closed = "only a blind comparison is voted on"
        elif not comparison.complete:
            kept.closed = "an answer was stopped or failed: run it again to vote"
        self._close_all("a newer comparison was run")
        self._kept = [*self._kept, kept][-MOST_KEPT:]
        self._shown = kept
        return kept

    def show(self, kept: KeptComparison) -> None:
        """Note that the page shows this one now: an older one, or one that somebody shared."""
        self._close_all("another comparison was opened")
        self._shown = kept

    def _close_all(self, why: str) -> None:
        for one in self._kept:
            one.closed = one.closed or why

    def shown(self) -> KeptComparison:
        """Return the comparison that the page shows.

        Raises:
            PageError: there is none, or its names are still hidden.
        """
        if self._shown is None:
            raise PageError("nothing was run yet")
        if not self._shown.closed:
            raise PageError("vote first: it would show the names")
        return self._shown

    def listed(self) -> list[KeptComparison]:
        """Return all whose names may be seen, the newest first."""
        return [one for one in reversed(self._kept) if one.closed]

    def find(self, identifier: str) -> KeptComparison:
        """Return a comparison by its id.

        Raises:
            PageError: it is not kept for this visitor.
        """
        for one in self.listed():
            if one.id == identifier:
                return one
        raise PageError("this comparison is no longer kept: run it again")

    def last(self) -> KeptComparison:
        """Return the comparison that was run last.

        Raises:
            PageError: there is none.
        """
        if not self._kept:
            raise PageError("nothing was run yet")
        return self._kept[-1]

    def close_last(self, why: str) -> KeptComparison:
        """End the voting on the last comparison.

        Raises:
            PageError: there is none, or it had ended.
        """
        kept = self.last()
        if kept.closed:
            raise PageError(kept.closed)
        kept.closed = why
        return kept
