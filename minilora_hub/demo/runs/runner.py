"""Run comparisons for visitors and API clients: the queue, the computing, and stopping. No Gradio.

Running comparisons are rows of the scheduler, where those of all visitors share forwards (see `scheduled.py`). On bases
whose rows can't be packed they take turns in a thread, a step each, and on ZeroGPU each comparison is one GPU call (see
`zero_gpu.py`).
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Collection, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from minilora_hub.compare.answer import Answer, Turns
from minilora_hub.compare.engine import Column, CompareEngine, Row, Sampling, Step, Update
from minilora_hub.compare.prompt_index import Choice
from minilora_hub.demo.adapters.catalogue import Catalogue
from minilora_hub.demo.runs import zero_gpu
from minilora_hub.demo.runs.auto_column import COLUMN, AutoColumn
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.own_sampling import with_own
from minilora_hub.demo.runs.scheduled import ScheduledRows, page_scheduler
from minilora_hub.demo.runs.waiting_queue import Ticket, Waiting, WaitingQueue
from minilora_hub.errors import AdapterError
from minilora_hub.serving.scheduler import Scheduler

FRAME_SECONDS = 0.04
"""Seconds over which updates are collected, since a fast machine generates more tokens than a screen can show."""

STOP_SECONDS, REPORT_SECONDS = 0.1, 1.0
"""Seconds between two checks of a waiting comparison, which report its position and whether it was stopped."""


@dataclass(frozen=True)
class Moment:
    """Progress of a comparison since the previous event.

    Attributes:
        waiting: its position in the queue; None once it runs.
        updates: updates of its rows.
        forwards: forward passes of the base for this comparison.
        finished: whether this is the last event.
        choice: the adapter that answers the column "auto", once, before its first update.
    """

    waiting: Waiting | None = None
    updates: list[Update] = field(default_factory=list)
    forwards: int = 0
    finished: bool = False
    choice: Choice | None = None


class Runner:
    """Runs comparisons of the models of one engine.

    Args:
        engine: the models.
        catalogue: the adapters that can be requested. Default: the engine's own.
        limits: size of one comparison, and how many run at once.
        auto: chooses the adapter of the column "auto". None: there is no such column.
        scheduler: computes the rows; from `page_scheduler`. Default: one of its own. Not used on ZeroGPU.
    """

    def __init__(
        self,
        engine: CompareEngine,
        catalogue: Catalogue | None = None,
        limits: PageLimits | None = None,
        auto: AutoColumn | None = None,
        scheduler: Scheduler | None = None,
    ) -> None:
        self.auto = auto
        self.engine, self.catalogue, self.limits = engine, catalogue or Catalogue(engine), limits or PageLimits()
        self.queue = WaitingQueue(self.limits.at_once, self.limits.waiting)
        self._fetching = asyncio.Lock()
        self._remote = zero_gpu.remote_steps(self.steps) if zero_gpu.is_zero_gpu() else None
        if scheduler is None and self._remote is None:
            scheduler = page_scheduler(engine, self.limits)
        self._scheduler = scheduler if scheduler is not None and scheduler.row_by_row is None else None
        threads = self.limits.at_once if self._remote else 1  # on ZeroGPU the threads only wait for a GPU process
        self._thread = ThreadPoolExecutor(threads, thread_name_prefix="minilora-compute")

    @property
    def fetches(self) -> bool:
        """Whether adapters other than the page's own can be shown; not on ZeroGPU, where none can be loaded later."""
        return self.catalogue.links is not None and self._remote is None

    async def fetch(self, name: str) -> Column:
        """Return the column of an adapter in an allowed folder or on the Hub; load it if it is not in memory.

        Raises:
            AdapterError: the adapter cannot be shown; the message says why.
        """
        links = self.catalogue.links
        if links is None or self._remote:
            raise AdapterError("this page shows its own adapters only")
        loop = asyncio.get_running_loop()
        async with self._fetching:
            if column := links.get(name):
                return column
            if folder := self.catalogue.folders.get(name):
                return await loop.run_in_executor(self._thread, links.load, name, folder)
            # The files are copied into memory and then removed.
            with tempfile.TemporaryDirectory(prefix="minilora-linked-") as temporary:
                repo = await asyncio.to_thread(links.fetch, name, Path(temporary))
                return await loop.run_in_executor(self._thread, links.load, name, Path(temporary), repo)

    def answer(
        self,
        prompt: str,
        sampling: Sampling,
        columns: Sequence[Column],
        stop: threading.Event | None = None,
        before: Sequence[Turns] | None = None,
        halted: Collection[int] = (),
        own: Sequence[Mapping[str, Any]] | None = None,
        among: Sequence[Column] | None = None,
    ) -> AsyncGenerator[Moment]:
        """Answer a prompt with these columns, after waiting in the queue.

        Closing or cancelling the iterator ends the computation within one step.

        Args:
            prompt: the prompt.
            sampling: the settings, for every column that has none of its own.
            columns: row i of the updates is column i.
            stop: ends the answers within one step when it is set; the last event holds them as they are.
            before: the messages before the prompt, for each column.
            halted: rows that end within one step; the caller may add to it.
            own: the settings of each column that replace those of `sampling`.
            among: what the column "auto" is chosen from. Default: `columns`.

        Raises:
            ValueError: the prompt is empty, something is above the limits, a setting of a column is wrong, or the queue
                is full.
        """
        turns = before or [()] * len(columns)
        for messages in set(turns) or {()}:
            self.limits.check("".join([*(text for _, text in messages), prompt]), sampling, len(columns))
        settings = [with_own(sampling, one) for one in own or [{}] * len(columns)]
        rows = [
            column.row(prompt, one, messages) for column, one, messages in zip(columns, settings, turns, strict=True)
        ]
        choosable, checked = None, rows
        if self.auto and COLUMN in columns:
            choosable = self.auto.known(among or columns)
            checked = self.auto.check(rows, choosable)
        self._require_fit(self.engine.answers(checked)[0])  # validates the prompts without computing anything
        ticket = self.queue.join(sampling.max_new_tokens)
        return self._moments(rows, choosable, ticket, stop or threading.Event(), halted)

    def _require_fit(self, answers: Sequence[Answer]) -> None:
        most = self._scheduler.most_tokens if self._scheduler else math.inf
        for answer in answers:
            if answer.prompt_tokens + answer.limit > most:
                raise ValueError(
                    f"prompt of {answer.prompt_tokens} tokens and an answer of up to {answer.limit}: must be at most "
                    f"{most} tokens together, for which this page has memory"
                )

    def steps(
        self,
        rows: list[Row],
        among: list[str] | None = None,
        stop: threading.Event | None = None,
        halted: Collection[int] = (),
    ) -> Generator[Choice | Step]:
        """Answer rows step by step; with `among`, first choose one of these adapters for the row "auto"."""
        if among is not None:
            assert self.auto is not None
            choice, rows = self.auto.choose(rows, among)
            yield choice
        yield from self.engine.stream_steps(rows, stop, halted)

    async def _moments(
        self,
        rows: list[Row],
        among: list[str] | None,
        ticket: Ticket,
        stop: threading.Event,
        halted: Collection[int],
    ) -> AsyncGenerator[Moment]:
        bank, kept = self.engine.bank, ExitStack()
        try:
            for name in {row.adapter for row in rows if row.adapter is not None and bank.find(row.adapter)}:
                kept.enter_context(bank.keep(name))  # a visitor who waits does not lose the adapter to others' links
            reported = 0.0
            while not (ticket.running.is_set() or stop.is_set()):
                if time.monotonic() - reported >= REPORT_SECONDS:
                    reported = time.monotonic()
                    yield Moment(waiting=self.queue.waiting(ticket))
                await ticket.wait(STOP_SECONDS)
            compute = self._scheduled if self._scheduler else self._in_turns
            before = time.perf_counter()
            async with aclosing(compute(rows, among, stop, halted)) as moments:
                async for moment in moments:
                    now = time.perf_counter()
                    if moment.forwards or moment.choice:  # otherwise its rows wait, or were only told to end
                        self.queue.stepped(ticket, moment.forwards, now - before)
                        before = now
                    if moment.finished:  # release the place now: the consumer may resume late
                        self.queue.leave(ticket, finished=not stop.is_set())
                    yield moment
        finally:
            kept.close()
            self.queue.leave(ticket)
            stop.set()

    async def _scheduled(
        self, rows: list[Row], among: list[str] | None, stop: threading.Event, halted: Collection[int]
    ) -> AsyncGenerator[Moment]:
        """Let the scheduler compute the rows."""
        assert self._scheduler is not None
        if among is not None:
            assert self.auto is not None
            loop = asyncio.get_running_loop()
            choice, rows = await loop.run_in_executor(self._thread, self.auto.choose, rows, among)
            yield Moment(choice=choice)
        answers, failed = await asyncio.to_thread(self.engine.answers, rows)
        left = len(answers)
        if failed:
            yield Moment(updates=failed, finished=not left)
        if not left:
            return
        async with aclosing(ScheduledRows(self._scheduler, answers, stop, halted).steps(FRAME_SECONDS)) as steps:
            async for step in steps:
                left -= sum(update.finished for update in step.updates)
                yield Moment(None, step.updates, step.forwards, not left)

    async def _in_turns(
        self, rows: list[Row], among: list[str] | None, stop: threading.Event, halted: Collection[int]
    ) -> AsyncGenerator[Moment]:
        """Compute the rows in the thread, or on ZeroGPU in a call."""
        steps = (self._remote_steps if self._remote else self.steps)(rows, among, stop, halted)
        # ZeroGPU reads the calling user from the context.
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        moment = Moment()
        try:
            while not moment.finished:
                moment = await loop.run_in_executor(self._thread, context.run, _advance, steps)
                yield moment
        finally:
            stop.set()
            self._thread.submit(steps.close)

    def _remote_steps(
        self, rows: list[Row], among: list[str] | None, stop: threading.Event, halted: Collection[int]
    ) -> Generator[Choice | Step]:
        """Compute in another process, which sees neither `stop` nor `halted`.

        On a stop, close the call and end its rows here; what halted rows still compute is dropped.
        """
        assert self._remote is not None
        last = [Update(index) for index in range(len(rows))]

        def ended(wanted: Collection[int]) -> list[Update]:
            open_rows = [one for one in last if one.row in wanted and not one.finished]
            ends = [replace(one, text="", token_id=None, finished=True, reason="stopped") for one in open_rows]
            for update in ends:
                last[update.row] = update
            return ends

        steps = self._remote(rows, among)
        try:
            for step in steps:
                if isinstance(step, Choice):
                    yield step
                    continue
                updates = [update for update in step.updates if not last[update.row].finished]
                for update in updates:
                    last[update.row] = update
                yield step._replace(updates=updates + ended(halted))
                if stop.is_set() or all(update.finished for update in last):
                    break
        finally:
            steps.close()
        if rest := ended(range(len(rows))):
            yield Step(0, rest)


def waiting_words(waiting: Waiting) -> str:
    """Return a sentence with the position in the queue and the waiting time."""
    if waiting.seconds is None:
        return f"Number {waiting.position} in the queue."
    seconds = max(1, round(waiting.seconds))
    shown = f"{seconds} s" if seconds < 90 else f"{round(seconds / 60)} min"
    return f"Number {waiting.position} in the queue: starting in about {shown}."


def _advance(steps: Generator[Choice | Step]) -> Moment:
    """Compute the steps of one frame, at least one."""
    began = time.perf_counter()
    updates: list[Update] = []
    forwards, finished = 0, True
    for step in steps:
        if isinstance(step, Choice):
            return Moment(choice=step)
        forwards += step.forwards
        updates += step.updates
        if time.perf_counter() - began >= FRAME_SECONDS:
            finished = False
            break
    return Moment(None, updates, forwards, finished)
