"""History of one visitor: the latest comparisons, and the one that the page shows. No Gradio."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from minilora_hub.demo.runs.comparison import Comparison
from minilora_hub.errors import PageError

MOST_KEPT = 20


@dataclass
class KeptComparison:
    """A comparison in the history: run by the visitor, or opened from a share link.

    Attributes:
        comparison: its content.
        order: of a blind comparison, the column index under each letter; None if it was not blind.
        closed: why it cannot be voted on; None while it can.
        shared: its id among the shared comparisons; None if it was not shared.
        id: random identifier.
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
        """Remove the oldest until at most `limit` bytes are used; the last and the shown comparison are kept."""
        for oldest in self._kept[:-1]:
            if self.memory <= limit:
                return
            if oldest is not self._shown:
                self._kept.remove(oldest)

    def clear(self) -> None:
        """Remove all comparisons."""
        self._kept, self._shown = [], None

    def add(self, comparison: Comparison, order: tuple[int, ...] | None = None) -> KeptComparison:
        """Add a comparison that has ended, as the shown one; `order` is that of a blind comparison."""
        kept = KeptComparison(comparison, order)
        if order is None:
            kept.closed = "only a blind comparison can be voted on"
        elif not comparison.complete:
            kept.closed = "an answer was stopped or failed: run it again to vote"
        self._close_all("a newer comparison was run")
        self._kept = [*self._kept, kept][-MOST_KEPT:]
        self._shown = kept
        return kept

    def show(self, kept: KeptComparison) -> None:
        """Set the shown comparison: an older one, or one from a share link."""
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
        """Return the comparisons whose names are not hidden, the newest first."""
        return [one for one in reversed(self._kept) if one.closed]

    def find(self, identifier: str) -> KeptComparison:
        """Return a comparison by its id.

        Raises:
            PageError: it is not in this visitor's history.
        """
        for one in self.listed():
            if one.id == identifier:
                return one
        raise PageError("this comparison is no longer in your history: run it again")

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
