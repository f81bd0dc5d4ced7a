"""Continuous batching over the bank: rows of any adapters join and leave the running batch at every step.

One thread computes. In each round it reads a piece of the prompts that joined last, and then runs one decode step of
all running rows, so that a long prompt delays the others by one piece at most. Rows whose prompts are read move into
the running batch.

transformers' own continuous batching was the alternative. It packs the tokens of all rows into one sequence, which
needs other adapter layers than the rest of this package and an attention with a paged cache; choosing the adapter and
the token of each row overrides private methods of transformers; and it returns no logits of a prompt. This scheduler
runs the forward of `CompareEngine`, for every family that has one, so its tokens are those of `CompareEngine`. Where
the cache of a model cannot be joined (see `cache_rows.py`), requests run as batches of their own, which take turns
step by step.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from minilora_hub.compare.answer import Answer, Update
from minilora_hub.compare.batch import Batch
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.errors import AdapterError, ServingError
from minilora_hub.serving.settings import ServerLimits

T = TypeVar("T")
SHUTTING_DOWN = "the server is shutting down"
UNUSABLE = (AdapterError, ValueError, OSError)
"""Exceptions that mean that an adapter is damaged or missing, or does not fit the base."""

PADDING_ALLOWANCE = 512
"""Padding tokens that prompts of different lengths may always cost when they are read together."""


@dataclass(eq=False)
class ServedRow:
    """A row that a request waits for.

    Attributes:
        answer: its state.
        limit: the most tokens it generates.
        deliver: called with each update, in the thread that computes; must return at once.
        started: when it was submitted, by `time.perf_counter`.
        cancelled: whether its client has left.
        status: HTTP status of its error, if it ends with one.
        held: keeps its adapter in memory while it runs.
    """

    answer: Answer
    limit: int
    deliver: Callable[[Update], None]
    started: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    status: int = 500
    held: ExitStack = field(default_factory=ExitStack)

    @property
    def adapter(self) -> str | None:
        """The adapter's name in the bank; None for the base."""
        return self.answer.row.adapter

    @property
    def most_tokens(self) -> int:
        """Number of tokens it may have in the cache."""
        return self.answer.prompt_tokens + self.limit


@dataclass(frozen=True)
class Load:
    """What a scheduler has to do.

    Attributes:
        running: rows in a batch.
        waiting: rows that wait.
        cache_bytes: size of the key/value caches.
        steps: forwards since the start.
        rows_computed: rows of all decode steps, so that the mean batch is ``rows_computed / steps``.
    """

    running: int
    waiting: int
    cache_bytes: int
    steps: int
    rows_computed: int


class Scheduler:
    """Runs rows on the models of an engine, in a thread of its own.

    Args:
        engine: the models; others may compute with them between two steps, as `CompareEngine.exclusive` lets them.
        limits: the bounds.
    """

    def __init__(self, engine: CompareEngine, limits: ServerLimits) -> None:
        self.engine, self.limits = engine, limits
        self._changed = threading.Condition()  # around a lock that one thread may take again
        self._waiting: deque[ServedRow] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._rows: dict[Answer, ServedRow] = {}  # in a batch
        self._reading: Batch | None = None  # its prompts are not read yet
        self._decoding: list[Batch] = []  # one, or several where batches cannot be joined
        self._steps = self._rows_computed = 0
        self._thread = threading.Thread(target=self._run, name="minilora-serve", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop_soon(self) -> None:
        """End every row with an error after the present step. A signal handler may call it: it takes no lock."""
        self._stopping = True

    def stop(self) -> None:
        """End every row with an error, and the thread after its present step."""
        self.stop_soon()
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def running(self) -> bool:
        """Whether the thread is alive and takes rows."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, rows: Sequence[ServedRow]) -> None:
        """Queue the rows of a request, all or none.

        Raises:
            ServingError: the queue is full (429), the request has more rows than ever fit (400), or the server is
                shutting down (503).
        """
        with self._changed:
            self.require_room(len(rows))
            self._waiting.extend(rows)
            self._changed.notify()

    def require_room(self, rows: int) -> None:
        """Check that this many rows can be queued now.

        Raises:
            ServingError: as `submit`.
        """
        most = self.limits.rows + self.limits.waiting
        allowed = min(most, self.limits.request_answers or most)
        if rows > allowed:
            raise ServingError(400, f"the request asks for {rows} answers: must be at most {allowed}", "n")
        if not self.running:
            raise ServingError(503, SHUTTING_DOWN, code="shutting_down")
        busy = len(self._rows) + len(self._waiting)
        if busy + rows > most:
            raise ServingError(
                429,
                f"the server is busy with {busy} of at most {most} answers: send the request again later",
                "n" if rows > 1 else None,
                "rate_limit_exceeded",
            )

    def cancel(self, rows: Sequence[ServedRow]) -> None:
        """Remove rows before the next step. Thread-safe; rows that have ended are left alone."""
        with self._changed:
            for row in rows:
                row.cancelled = True
            self._changed.notify()

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Run a function between two steps in the thread that computes."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(*arguments))
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            if not self.running:
                raise ServingError(503, SHUTTING_DOWN, code="shutting_down")
            self._calls.append(run)
            self._changed.notify()
        return future

    def in_use(self) -> Counter[str]:
        """Count the rows of each adapter that run or wait."""
        with self._changed:
            return Counter(row.adapter for row in (*self._rows.values(), *self._waiting) if row.adapter is not None)

    def load(self) -> Load:
        """Return what there is to do. Call it through `call`, because it looks at the caches."""
        batches = [*self._decoding, *([self._reading] if self._reading else [])]
        cache_bytes = sum(batch.cache_bytes for batch in batches)
        return Load(len(self._rows), len(self._waiting), cache_bytes, self._steps, self._rows_computed)

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._waiting or self._calls or self._rows):
                    self._changed.wait()
                calls, self._calls = [*self._calls], deque()
            for call in calls:
                call()
            self._drop_cancelled()
            if self._stopping:
                self._end_all(SHUTTING_DOWN)
                return
            try:
                if self._reading is None:
                    self._admit()
                self._step()
            except Exception as error:  # it cannot be attributed to one row; without this, every client would wait
                self._reading, self._decoding = None, []
                for row in [*self._rows.values()]:
                    self._deliver(row, row.answer.end("error", f"{type(error).__name__}: {error}"))

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(row.cancelled for row in self._waiting):
                self._waiting = deque(row for row in self._waiting if not row.cancelled)
            gone = [row for row in self._rows.values() if row.cancelled]
        if not gone:
            return
        answers = {row.answer for row in gone}
        for batch in self._batches():
            batch.drop(answers)
        for row in gone:
            self._release(row)
        self._forget_empty()

    def _admit(self) -> None:
        """Make a batch of the rows that wait and fit, in the order in which they came."""
        admitted: list[ServedRow] = []
        while True:
            with self._changed:
                row = self._waiting[0] if self._waiting else None
                if row is None or not self._fits(row, admitted):
                    break
                self._waiting.popleft()
                self._rows[row.answer] = row
            try:
                with self.engine.exclusive():
                    row.held.enter_context(self.engine.bank.use([row.adapter]))
            except Exception as error:  # a damaged or missing adapter ends only its own rows
                row.status = 400 if isinstance(error, UNUSABLE) else 500
                self._deliver(row, row.answer.end("error", f"adapter {row.adapter!r} cannot be used: {error}"))
            else:
                admitted.append(row)
        if admitted:
            self._reading = Batch(self.engine.bank, [row.answer for row in admitted])

    def _fits(self, row: ServedRow, admitted: Sequence[ServedRow]) -> bool:
        count = len(self._rows) + 1
        if count == 1:
            return True  # alone it may be larger than the cache's bound
        longest = max(other.most_tokens for other in (row, *self._rows.values()))
        if count > self.limits.rows or count * longest > self.limits.cache_tokens:
            return False
        prompts = [other.answer.prompt_tokens for other in (*admitted, row)]
        padding = len(prompts) * max(prompts) - sum(prompts)
        return padding <= sum(prompts) + PADDING_ALLOWANCE

    def _step(self) -> None:
        for batch in self._batches():
            count = len(batch.answers)
            with self.engine.exclusive():
                updates = batch.step()
            self._steps += 1
            if updates:
                self._rows_computed += count
            if updates and batch is self._reading:
                self._reading = None
                self._decoding.append(batch)
            rows = {row.answer.index: row for row in self._rows.values()}
            for update in updates:
                self._deliver(rows[update.row], update)
            self._forget_empty()
        if len(self._decoding) > 1:
            first, *others = self._decoding
            for other in others:
                if first.joinable and other.joinable:
                    with self.engine.exclusive():
                        first.join(other)
            self._forget_empty()

    def _batches(self) -> list[Batch]:
        return [*([self._reading] if self._reading else []), *self._decoding]

    def _forget_empty(self) -> None:
        if self._reading is not None and self._reading.finished:
            self._reading = None
        self._decoding = [batch for batch in self._decoding if not batch.finished]

    def _deliver(self, row: ServedRow, update: Update) -> None:
        if update.finished:
            self._release(row)
        row.deliver(update)

    def _release(self, row: ServedRow) -> None:
        row.held.close()
        with self.engine.exclusive():
            self.engine.bank.make_room()
        with self._changed:
            self._rows.pop(row.answer, None)

    def _end_all(self, message: str) -> None:
        with self._changed:
            rows = [*self._rows.values(), *self._waiting]
            self._waiting.clear()
            calls, self._calls = [*self._calls], deque()
        for call in calls:
            call()
        self._reading, self._decoding = None, []
        for row in rows:
            row.status = 503
            self._deliver(row, row.answer.end("error", message))
