"""Runs comparisons for visitors and programs: who waits, who computes, who stops. `frames.py` says what is shown.

All torch work happens in one thread, whoever asked for it: threads that compute at once fight over the cores. Those who
have a place in the line take turns in it, a step at a time (see `line.py`). On ZeroGPU each comparison is a call of its
own instead (see `zero_gpu.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

from minilora_hub.compare.engine import Column, CompareEngine, Row, Sampling, Update
from minilora_hub.demo.adapters.columns import describe_columns
from minilora_hub.demo.adapters.from_hub import LinkedAdapters, temporary_folder
from minilora_hub.demo.runs import zero_gpu
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.solo_experts import Solo
from minilora_hub.demo.runs.waiting_queue import Line, Ticket, Waiting
from minilora_hub.demo.ui.page_state import Comparison, Frame
from minilora_hub.errors import AdapterError

FRAME_SECONDS = 0.04
"""A fast machine makes more tokens than a screen can show; they are gathered for this long before the page is told."""

STOP_SECONDS, TELL_SECONDS = 0.1, 1.0
"""How often one who waits looks whether they are to stop, and is told where they stand."""


@dataclass(frozen=True)
class Moment:
    """What became of a comparison since the moment before.

    Attributes:
        waiting: where it stands in line; None once it computes.
        updates: of its rows.
        forwards: of the base, for it alone.
        finished: nothing follows.
    """

    waiting: Waiting | None = None
    updates: list[Update] = field(default_factory=list)
    forwards: int = 0
    finished: bool = False


class LiveRuns:
    """Runs comparisons, and stops them when asked.

    Args:
        engine: the models.
        links: the adapters that visitors' links name; None where links are not followed.
        limits: what one comparison may cost, and how many take turns. Default: those of `PageLimits`.
    """

    def __init__(
        self, engine: CompareEngine, links: LinkedAdapters | None = None, limits: PageLimits | None = None
    ) -> None:
        """Start without visitors; see the class."""
        self.engine, self.links, self.limits = engine, links, limits or PageLimits()
        self._opened: dict[str, str] = {}
        self._solo_asked: dict[str, Solo] = {}
        self._solo: dict[str, Solo] = {}
        self._opening = asyncio.Lock()
        self._remote = zero_gpu.remote_steps(engine) if zero_gpu.is_zero_gpu() else None
        threads = self.limits.at_once if self._remote else 1  # on ZeroGPU they only wait for a process that computes
        self._thread = ThreadPoolExecutor(threads, thread_name_prefix="minilora-compute")
        self._line = Line(self.limits.at_once, self.limits.waiting)
        self._runs: dict[str, tuple[int, threading.Event]] = {}
        self._numbers = count(1)

    async def open(self, visitor: str, name: str) -> Column:
        """Show a visitor the adapter that a link named, beside the base.

        Raises:
            AdapterError: it cannot be; the message says why.
        """
        column = await self.fetch(name)
        self.stop(visitor)
        self._opened[visitor] = name
        return column

    async def fetch(self, name: str) -> Column:
        """Return an adapter on the Hub as a column, fetched and loaded if it is not kept. One at a time.

        Raises:
            AdapterError: it cannot be; the message says why.
        """
        if self.links is None or self._remote:
            raise AdapterError("this page shows its own adapters only")
        loop = asyncio.get_running_loop()
        async with self._opening:
            column = self.links.get(name)
            if column is not None:
                return column
            if folder := self._folder_of(name):
                return await loop.run_in_executor(self._thread, self.links.load, name, folder)
            with temporary_folder() as temporary:
                await asyncio.to_thread(self.links.fetch, name, Path(temporary))
                return await loop.run_in_executor(self._thread, self.links.load, name, Path(temporary))

    def _folder_of(self, name: str) -> Path | None:
        """Tell where an adapter lies on this machine, if visitors may choose it; None: it is fetched from the Hub."""
        return None

    def columns_of(self, visitor: str) -> tuple[Column, ...]:
        """Return the columns a visitor sees.

        Raises:
            AdapterError: the adapter was put away, since other visitors opened others.
        """
        columns = self._all_columns_of(visitor)
        return self._solo[visitor].columns(columns) if visitor in self._solo else columns

    def _all_columns_of(self, visitor: str) -> tuple[Column, ...]:
        """Return them without experts that answer alone; see `columns_of`."""
        name = self._opened.get(visitor)
        if self.links is None or name is None:
            return self.engine.columns
        linked = self.links.get(name)
        if linked is None:
            raise AdapterError(f"{name} was put away, as other visitors have opened others: reload the page")
        return self.engine.columns[0], linked

    def ask_solo(self, visitor: str, solo: Solo) -> None:
        """Let experts of an adapter answer alone, each in a column of its own, in the visitor's next comparison only.

        Raises:
            AdapterError: the visitor does not see this adapter, or it has no such expert.
        """
        solo.columns(self._all_columns_of(visitor))
        self._solo_asked[visitor] = solo

    def begin(self, visitor: str) -> Frame:
        """Take a place for a visitor's next comparison, and end the one that may still run."""
        self.stop(visitor)
        self._solo.pop(visitor, None)
        if visitor in self._solo_asked:
            self._solo[visitor] = self._solo_asked.pop(visitor)
        number = next(self._numbers)
        self._runs[visitor] = (number, threading.Event())
        words = "Waiting for a place…" if self._line.full else "Reading the prompt…"
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
        for kept in (self._opened, self._solo, self._solo_asked):
            kept.pop(visitor, None)

    async def run(self, visitor: str, prompt: str, sampling: Sampling) -> AsyncGenerator[Frame]:
        """Answer a prompt in the place taken by `begin`.

        Leaving the iterator early, by closing or cancelling it, ends the computation within one step.
        """
        number, stop = self._runs.get(visitor) or (next(self._numbers), threading.Event())
        comparison = Comparison(number, self.about(visitor), prompt, sampling, self.engine.token_text)
        try:
            moments = self.answer(prompt, sampling, self.columns_of(visitor), stop)
        except (ValueError, AdapterError) as error:
            yield comparison.refused(f"{error}")
            return
        try:
            async for moment in moments:
                if moment.waiting is not None:
                    yield comparison.waiting(waiting_words(moment.waiting))
                    continue
                for update in moment.updates:
                    comparison.add(update)
                comparison.forwards += moment.forwards
                yield comparison.frame(finished=moment.finished, stopped=stop.is_set())
        finally:
            await moments.aclose()

    def answer(
        self, prompt: str, sampling: Sampling, columns: Sequence[Column], stop: threading.Event | None = None
    ) -> AsyncGenerator[Moment]:
        """Answer a prompt with these columns, once there is a place.

        Leaving the iterator early, by closing or cancelling it, ends the computation within one step.

        Args:
            prompt: what was typed or sent.
            sampling: the same for every column.
            columns: row i of the updates is column i.
            stop: set it, and the answers end within one step, as they are by then.

        Raises:
            ValueError: the prompt is empty or too long, too much is asked for, or too many are waiting.
        """
        self.limits.check(prompt, sampling, len(columns))
        rows = [column.row(prompt, sampling) for column in columns]
        self.engine.stream_steps(rows)  # raises what is wrong with the prompt; computes nothing
        return self._moments(rows, self._line.join(sampling.max_new_tokens), stop or threading.Event())

    async def _moments(self, rows: list[Row], ticket: Ticket, stop: threading.Event) -> AsyncGenerator[Moment]:
        steps: Generator[zero_gpu.Step] | None = None
        finished = False
        try:
            told = 0.0
            while not (ticket.admitted or stop.is_set()):
                if time.monotonic() - told >= TELL_SECONDS:
                    told = time.monotonic()
                    yield Moment(waiting=ticket.waiting())
                await ticket.wait(STOP_SECONDS)
            steps = self._remote_steps(rows, stop) if self._remote else self._local_steps(rows, stop)
            loop, context = asyncio.get_running_loop(), contextvars.copy_context()  # ZeroGPU asks it who is calling
            while not finished:
                moment, steps_done, seconds = await loop.run_in_executor(self._thread, context.run, _advance, steps)
                ticket.stepped(steps_done, seconds)
                finished = moment.finished
                if finished:  # at once: whoever reads may take their time to come back
                    ticket.leave(finished=not stop.is_set())
                yield moment
        finally:
            ticket.leave()
            stop.set()
            if steps is not None:
                self._thread.submit(steps.close)

    def _local_steps(self, rows: list[Row], stop: threading.Event) -> Generator[zero_gpu.Step]:
        return zero_gpu.counted(self.engine, self.engine.stream_steps(rows, stop))

    def _remote_steps(self, rows: list[Row], stop: threading.Event) -> Generator[zero_gpu.Step]:
        """Steps of a call whose process knows nothing of `stop`: it is closed, and its rows end here."""
        assert self._remote is not None
        last = [Update(index) for index in range(len(rows))]
        steps = self._remote(rows)
        try:
            for forwards, updates in steps:
                for update in updates:
                    last[update.row] = update
                yield forwards, updates
                if stop.is_set():
                    break
        finally:
            steps.close()
        ended = [
            replace(update, text="", token_id=None, finished=True, reason="stopped")
            for update in last
            if not update.finished
        ]
        if ended:
            yield 0, ended


def waiting_words(waiting: Waiting) -> str:
    """Say where somebody stands, and for how long."""
    if waiting.seconds is None:
        return f"Number {waiting.position} in line."
    seconds = max(1, round(waiting.seconds))
    told = f"{seconds} s" if seconds < 90 else f"{round(seconds / 60)} min"
    return f"Number {waiting.position} in line: your turn comes in about {told}."


def _advance(steps: Generator[zero_gpu.Step]) -> tuple[Moment, int, float]:
    """Gather steps for one moment: one, or as many as fit into a frame. Returns also how many, in how many seconds."""
    began = time.perf_counter()
    updates: list[Update] = []
    forwards, amount, finished = 0, 0, True
    for done, changed in steps:
        forwards, amount = forwards + done, amount + 1
        updates += changed
        if time.perf_counter() - began >= FRAME_SECONDS:
            finished = False
            break
    return Moment(None, updates, forwards, finished), amount, time.perf_counter() - began
