"""Runs comparisons for the page's visitors: who waits, who runs, who stops. No Gradio; `frames.py` says what is shown.

All torch work of the page happens in one thread, whoever asked for it: threads that compute at once fight over the
cores.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from minilora_hub.compare.engine import Column, CompareEngine, Sampling, Update
from minilora_hub.demo.describing import describe_columns
from minilora_hub.demo.frames import Comparison, Frame
from minilora_hub.demo.linked import LinkedAdapters, temporary_folder
from minilora_hub.errors import AdapterError

FRAME_SECONDS = 0.04
"""A fast machine makes more tokens than a screen can show; they are gathered for this long before the page is told."""


class LiveRuns:
    """Runs comparisons for the page's visitors, one after the other, and stops them when asked.

    Args:
        engine: the models.
        links: the adapters that visitors' links name; None where links are not followed.
    """

    def __init__(self, engine: CompareEngine, links: LinkedAdapters | None = None) -> None:
        """Start without visitors; see the class."""
        self.engine, self.links = engine, links
        self._opened: dict[str, str] = {}
        self._opening = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="minilora-compute")
        self._runs: dict[str, tuple[int, threading.Event]] = {}
        self._numbers = count(1)
        self._busy = 0

    async def open(self, visitor: str, name: str) -> Column:
        """Show a visitor the adapter that a link named, beside the base. One link is followed at a time.

        Raises:
            AdapterError: it cannot be; the message says why.
        """
        if self.links is None:
            raise AdapterError("this page shows its own adapters only")
        loop = asyncio.get_running_loop()
        async with self._opening:
            column = self.links.get(name)
            if column is None:
                with temporary_folder() as folder:
                    await asyncio.to_thread(self.links.fetch, name, Path(folder))
                    column = await loop.run_in_executor(self._thread, self.links.load, name, Path(folder))
        self.stop(visitor)
        self._opened[visitor] = name
        return column

    def columns_of(self, visitor: str) -> tuple[Column, ...]:
        """Return the columns a visitor sees.

        Raises:
            AdapterError: the adapter was put away, since other visitors opened others.
        """
        name = self._opened.get(visitor)
        if self.links is None or name is None:
            return self.engine.columns
        linked = self.links.get(name)
        if linked is None:
            raise AdapterError(f"{name} was put away, as other visitors have opened others: reload the page")
        return self.engine.columns[0], linked

    def begin(self, visitor: str) -> Frame:
        """Take a place for a visitor's next comparison, and end the one that may still run."""
        self.stop(visitor)
        number = next(self._numbers)
        self._runs[visitor] = (number, threading.Event())
        words = "Waiting for another visitor's comparison to end…" if self._busy else "Reading the prompt…"
        return Comparison(number, self.about(visitor)).waiting(words)

    def about(self, visitor: str) -> list[dict]:
        """Describe the columns a visitor sees; the page's own, where theirs was put away."""
        try:
            columns = self.columns_of(visitor)
        except AdapterError:
            columns = self.engine.columns
        return describe_columns(self.engine, columns)

    def stop(self, visitor: str) -> None:
        """End a visitor's comparison within one step, whether it waits or runs; nothing happens if there is none."""
        if visitor in self._runs:
            self._runs[visitor][1].set()

    def leave(self, visitor: str) -> None:
        """Forget a visitor who closed the page."""
        self.stop(visitor)
        self._runs.pop(visitor, None)
        self._opened.pop(visitor, None)

    async def run(self, visitor: str, prompt: str, sampling: Sampling) -> AsyncIterator[Frame]:
        """Answer a prompt in the place taken by `begin`.

        Leaving the iterator early, by closing or cancelling it, ends the computation within one step.
        """
        number, stop = self._runs.get(visitor) or (next(self._numbers), threading.Event())
        comparison = Comparison(number, self.about(visitor), prompt)
        try:
            updates = self.engine.stream(prompt, sampling, stop, self.columns_of(visitor))
        except (ValueError, AdapterError) as error:
            yield comparison.refused(f"{error}")
            return
        loop = asyncio.get_running_loop()
        self._busy += 1
        try:
            finished = False
            while not finished:
                finished = await loop.run_in_executor(self._thread, self._advance, updates, comparison)
                yield comparison.frame(finished=finished, stopped=stop.is_set())
        finally:
            self._busy -= 1
            stop.set()
            self._thread.submit(updates.close)

    def _advance(self, updates: Iterator[Update], comparison: Comparison) -> bool:
        """Gather updates for one frame; say whether the stream has ended."""
        before, until = self.engine.forwards, time.perf_counter() + FRAME_SECONDS
        finished = True
        for update in updates:
            comparison.add(update)
            if time.perf_counter() >= until:
                finished = False
                break
        comparison.forwards += self.engine.forwards - before
        return finished
