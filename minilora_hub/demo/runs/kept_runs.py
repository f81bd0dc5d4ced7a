"""Runs whose end is remembered, blind where a visitor wants it, over the adapters that they chose. No Gradio."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path

from minilora_hub.compare.engine import Column, CompareEngine, Sampling
from minilora_hub.demo.adapters.catalogue import CHOSEN, Catalogue
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.comparison import Record
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.runner import LiveRuns
from minilora_hub.demo.runs.visits import Visits
from minilora_hub.demo.ui.page_state import Frame
from minilora_hub.demo.votes.blind import Blindfold, shuffled
from minilora_hub.documents import Scalar
from minilora_hub.errors import AdapterError, PageError


class KeptRuns(LiveRuns):
    """`LiveRuns` that hand what has ended to `visits`.

    Args:
        engine: the models.
        links: the adapters that visitors name; None where there are only the page's own.
        visits: what remembers the ends.
        catalogue: the adapters that can be chosen.
        limits: see `LiveRuns`.
    """

    def __init__(
        self,
        engine: CompareEngine,
        links: LinkedAdapters | None,
        visits: Visits,
        catalogue: Catalogue,
        limits: PageLimits | None = None,
    ) -> None:
        """Start without visitors; see the class."""
        super().__init__(engine, links, limits)
        self.visits, self.catalogue = visits, catalogue
        self._blind: set[str] = set()
        self._chosen: dict[str, tuple[str, ...]] = {}

    def is_blind(self, visitor: str) -> bool:
        """Whether the visitor's next comparison is blind."""
        return visitor in self._blind

    def make_blind(self, visitor: str, blind: bool) -> None:
        """Choose whether a visitor's next comparisons are blind."""
        (self._blind.add if blind else self._blind.discard)(visitor)

    async def run(self, visitor: str, prompt: str, sampling: Sampling) -> AsyncGenerator[Frame]:
        """Answer a prompt, as `LiveRuns.run` does; blind frames hold nothing that tells the columns apart."""
        about = self.about(visitor)
        # Drawn here and not when a place was taken: an older run of this visitor must not show the same order.
        hidden = Blindfold(shuffled(len(about))) if self._hides(visitor) else None
        names = [one["adapter"] for one in about[1:]]
        hashing = asyncio.create_task(asyncio.to_thread(self.catalogue.weights, names))
        async with aclosing(super().run(visitor, prompt, sampling)) as frames:
            async for frame in frames:
                if frame.finished and frame.stage["columns"][0]["state"] != "idle":
                    record = Record(
                        prompt, told(sampling), self.catalogue.base, frame.stage, frame.status, await hashing
                    )
                    if not self._hides(visitor):  # switched off meanwhile
                        hidden = None
                    kept = self.visits.keep(visitor, record, hidden.order if hidden else None)
                    if kept.closed:
                        hidden = None
                yield hidden.frame(frame) if hidden else frame

    def _hides(self, visitor: str) -> bool:
        # Experts that answer alone are named by the visitor: there is nothing to hide.
        return self.is_blind(visitor) and visitor not in self._solo

    def begin(self, visitor: str) -> Frame:
        """Take a place for a visitor's next comparison, and end the one that may still run."""
        frame = super().begin(visitor)
        waiting = Blindfold(tuple(range(len(frame.stage["columns"]))))
        return waiting.frame(frame) if self._hides(visitor) else frame

    def leave(self, visitor: str) -> None:
        """Forget a visitor who closed the page."""
        super().leave(visitor)
        self.visits.forget(visitor)
        self._blind.discard(visitor)
        self._chosen.pop(visitor, None)

    # ---- which adapters ----

    @property
    def fetches(self) -> bool:
        """Whether adapters that are not the page's own can be shown; on ZeroGPU nothing is loaded later."""
        return self.links is not None and self._remote is None

    def chosen(self, visitor: str) -> list[str]:
        """Return the names of the adapters that a visitor sees."""
        try:
            return [column.name for column in self._all_columns_of(visitor)[1:]]
        except AdapterError:
            return []

    async def choose(self, visitor: str, names: Sequence[str]) -> None:
        """Show a visitor these adapters beside the base, in this order; those that are not here yet are fetched.

        Raises:
            PageError: there are none or too many of them.
            AdapterError: one cannot be shown; the message says why, and what the visitor sees stays as it was.
        """
        names = list(dict.fromkeys(names))
        if not 1 <= len(names) <= CHOSEN:
            raise PageError(f"{len(names)} adapters are chosen: choose 1 to {CHOSEN}")
        own = {column.name for column in self.engine.columns[1:]}
        others = [name for name in names if name not in own]
        for name in others:
            await self.fetch(name)
        if self.links and len([name for name in others if self.links.get(name)]) < len(others):
            raise AdapterError(f"this page keeps {self.links.limits.kept} adapters beside its own: choose fewer")
        self.stop(visitor)
        self._opened.pop(visitor, None)
        self._chosen[visitor] = tuple(names)

    def _all_columns_of(self, visitor: str) -> tuple[Column, ...]:
        if visitor not in self._chosen or visitor in self._opened:
            return super()._all_columns_of(visitor)
        here = {column.name: column for column in self.engine.columns}
        columns = [self.engine.columns[0]]
        for name in self._chosen[visitor]:
            column = here.get(name) or (self.links.get(name) if self.links else None)
            if column is None:
                raise AdapterError(f"{name} was put away, as other visitors have opened others: choose it again")
            columns.append(column)
        return tuple(columns)

    def _folder_of(self, name: str) -> Path | None:
        """A folder that the page's owner allows is loaded from where it is; see `LiveRuns.fetch`."""
        return self.catalogue.folders.get(name)


def told(sampling: Sampling) -> dict[str, Scalar]:
    """Return what is written down of a sampling."""
    fields = dataclasses.asdict(sampling)
    del fields["stop"]
    return fields
