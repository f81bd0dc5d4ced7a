"""Comparisons as rows of the scheduler of `minilora serve`, beside those of other visitors and of OpenAI's API."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Collection, Sequence

from minilora_hub.compare.answer import Answer, Step, Update
from minilora_hub.compare.engine import CompareEngine, context_length
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.errors import ServingError
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import Scheduler
from minilora_hub.serving.settings import ServerLimits

ROW_TOKENS = 128
"""Tokens of a row for which the cache has room when as many rows run as may; it is allocated at the start."""

MOST_CACHE = 16384
"""The most tokens of the cache, unless one row may be longer; beyond it rows wait for each other."""

LEAST_CACHE = 1024
"""The smallest cache, in tokens, of a page on a machine with little memory."""


def page_scheduler(engine: CompareEngine, limits: PageLimits) -> Scheduler:
    """Return the scheduler of a page and of OpenAI's API beside it.

    Args:
        engine: the page's models.
        limits: of the page. Of OpenAI's API, `at_once` answers and `waiting` more are taken; the others bound a
            request.

    Raises:
        ServingError: there is too little memory for a cache.
    """
    # A character may be several tokens, and a chat template has some of its own.
    longest = min(context_length(engine.bank.model), 4 * limits.prompt + limits.tokens + ROW_TOKENS)
    cache_tokens = max(min(ROW_TOKENS * limits.at_once * limits.rows, MOST_CACHE), longest)
    while True:
        bounds = ServerLimits(
            rows=limits.at_once,
            waiting=max(1, limits.waiting),
            cache_tokens=cache_tokens,
            default_tokens=limits.tokens,
            answer_tokens=limits.tokens,
            prompt_characters=limits.prompt,
            request_answers=limits.rows,
            page_rows=limits.at_once * limits.rows,
        )
        try:
            scheduler = Scheduler(engine, bounds)
        except ServingError:
            if cache_tokens <= LEAST_CACHE:
                raise
            cache_tokens //= 2  # rows then wait for each other sooner
        else:
            atexit.register(scheduler.stop)  # a thread that computes while the process ends may crash it
            return scheduler


class ScheduledRows:
    """The rows of one comparison, for the event loop that makes it.

    Args:
        scheduler: computes them; it is started if it is not running.
        answers: the rows.
        stop: ends all of them within one step when it is set, from any thread.
        halted: indices of rows that end within one step; the caller may add to it.
    """

    def __init__(
        self, scheduler: Scheduler, answers: Sequence[Answer], stop: threading.Event, halted: Collection[int]
    ) -> None:
        self._stop, self._halted = stop, halted
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._updates: deque[Update] = deque()
        self._forwards = 0
        self._left = len(answers)
        scheduler.start()
        scheduler.submit([self._row(answer) for answer in answers])

    def _row(self, answer: Answer) -> ServedRow:
        def stopped() -> bool:
            return self._stop.is_set() or answer.index in self._halted

        return ServedRow(answer, answer.limit, self._deliver, bounded=False, stopped=stopped, stepped=self._stepped)

    async def steps(self, seconds: float) -> AsyncGenerator[Step]:
        """Yield what was computed since the last time, at most once in so many seconds, until all rows have ended."""
        seen, last = 0, -seconds
        while self._left:
            await self._changed.wait()
            # The scheduler delivers the updates of a step one after the other.
            await asyncio.sleep(max(0.001, last + seconds - time.monotonic()))
            self._changed.clear()
            last = time.monotonic()
            updates = [self._updates.popleft() for _ in range(len(self._updates))]
            forwards = self._forwards
            self._left -= sum(update.finished for update in updates)
            yield Step(forwards - seen, updates)
            seen = forwards

    # ---- in the scheduler's thread ----

    def _stepped(self) -> None:
        self._forwards += 1

    def _deliver(self, update: Update) -> None:
        self._updates.append(update)
        try:
            self._loop.call_soon_threadsafe(self._changed.set)
        except RuntimeError:  # the event loop is closed
            self._stop.set()
