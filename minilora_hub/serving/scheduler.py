"""Continuous batching over the bank: rows of any adapters join and leave the running batch at every step.

transformers' `ContinuousBatchingManager` does the work: its thread, its queues, its paged cache, the choice of the
tokens of a step with long prompts in pieces, cancellation, and waiting where the cache is full. What it has no room for
is added at its public seams:

- A `ModelRunner` of ours, since its own knows one model and one way to choose tokens. Ours says which adapter each
  packed token has, and lets each row's `Answer` choose: seeds and penalties per row, logprobs, logits of a prompt, stop
  strings, routed experts, and errors that end one row.
- A scheduler of ours, in its table of schedulers, sorts the rows of a step by adapter, so that each adapter's tokens
  are adjacent, and says when a cancelled row is gone. Its order of service is that of transformers' `FIFOScheduler`,
  but for the first row of each request, which overtakes, and for steps in which prompts are read alone.
- Attention on a CPU: see `packed_attention.py`. Bases whose layers can't tell packed rows apart, which are found by
  trying, run row by row in the same batches: see `forwards.py`.
- Bounds of the queue, since its own blocks the caller where the queue is full.
- Token ids of their own for each adapter, so that rows with a common prefix share its keys and values within an adapter
  only: see `token_spaces.py`.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any, Final

import torch
import transformers
from packaging.version import Version
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.errors import ServingError
from minilora_hub.serving.batching_manager import PAGE, build_manager
from minilora_hub.serving.forwards import PackedForward, SeparateForward, differs, stand_in
from minilora_hub.serving.rows import Load, ServedRow
from minilora_hub.serving.settings import ServerLimits
from minilora_hub.serving.steps import Steps
from minilora_hub.serving.token_spaces import LARGEST, TokenSpaces

PACKS: Final = Version("5.24")
"""The first transformers whose attention is handed the keys that the paged cache has, and not the cache."""

SHUTTING_DOWN = "the server is shutting down"


class Scheduler:
    """Runs rows on the models of an engine, in a thread of its own.

    Args:
        engine: the models; others may compute with them between two steps, as `CompareEngine.exclusive` lets them.
        limits: the bounds.

    Attributes:
        row_by_row: why rows are computed one after the other; None where they are packed.

    Raises:
        ServingError: there is too little memory for a cache of `limits.cache_tokens`.
    """

    def __init__(self, engine: CompareEngine, limits: ServerLimits) -> None:
        self.engine, self.limits = engine, limits
        self._lock = threading.Lock()  # around changes of the dictionary; never held while something computes
        self._rows: dict[str, ServedRow] = {}
        self._numbers = itertools.count()
        self._stopping = False
        with engine.exclusive():
            self.row_by_row = self._try_packed(engine.bank)
        if self.row_by_row is not None:
            self._manager = self._build(stand_in(), share=False)
        processor: Any = self._manager.batch_processor
        self._cache, self._order = processor.cache, processor.scheduler
        model: Any = engine.bank.model
        vocabulary = LARGEST if self.row_by_row is not None else model.get_input_embeddings().weight.shape[0]
        # One space is enough where rows have caches of their own.
        self._spaces = TokenSpaces(vocabulary, self._spaces_in_use, self._forget_prefixes)
        forward = (PackedForward if self.row_by_row is None else SeparateForward)(engine.bank)
        self._steps = Steps(engine, forward, self._spaces, self._rows, self._let_go)

    def _try_packed(self, bank: AdapterBank) -> str | None:
        """Build the manager for the bank's model; return why its rows can't be packed, or None."""
        if Version(transformers.__version__) < PACKS:
            return f"transformers is {transformers.__version__}, and packs the rows of adapters from {PACKS} on"
        if not getattr(bank.model, "_supports_attention_backend", False):
            return f"{type(bank.model).__name__} has an attention of its own"
        try:
            self._manager = self._build(bank.model, share=True)
        except (ValueError, AttributeError) as error:  # the manager refuses some kinds of attention and of layers
            return str(error)
        return differs(bank, self._manager.batch_processor)

    def _build(self, model: Any, share: bool) -> ContinuousBatchingManager:
        heard = (self._step, self._leaving, self._removed, self._failed, self._rows.get)
        return build_manager(model, self.limits, *heard, share)

    def start(self) -> None:
        """Start the thread, unless it has been started."""
        if self._manager.is_running() or self._stopping:
            return

        def begin() -> None:
            with torch.inference_mode():
                self._manager.start()

        # The manager's thread inherits the inference mode and being a daemon, which does not keep a process alive.
        starter = threading.Thread(target=begin, daemon=True)
        starter.start()
        starter.join()

    def stop_soon(self) -> None:
        """End every row with an error before the next step. A signal handler may call it: it takes no lock."""
        self._stopping = True

    def stop(self) -> None:
        """End every row with an error, and the thread after its present step."""
        self.stop_soon()
        if self._manager.is_running():
            self._manager.stop(hard_stop=True)
        self._end_all()

    @property
    def running(self) -> bool:
        """Whether the thread is alive and takes rows."""
        return self._manager.is_running() and not self._stopping

    @property
    def most_tokens(self) -> int:
        """The most tokens that one row may have in the cache."""
        return -(-self.limits.cache_tokens // PAGE) * PAGE

    def submit(self, rows: Sequence[ServedRow]) -> None:
        """Queue the rows of a request, all or none; they begin in one step where there is room.

        Raises:
            ServingError: the queue is full (429), the request has more rows than ever fit (400), or the server is
                shutting down (503).
        """
        with self._lock:
            self.require_room(sum(row.bounded for row in rows))
            for index, row in enumerate(rows):
                row.number, row.first = next(self._numbers), index == 0
                entry = None if row.adapter is None else self.engine.bank.find(row.adapter)
                if entry is not None:
                    row.held.enter_context(self.engine.bank.keep(entry.name))
                mixture = entry is not None and entry.facts.experts > 0
                solo = row.answer.row.solo_expert
                expert = "" if solo is None else f"{solo:04}"
                row.key = f"{int(mixture)} {row.adapter or ''} {expert} {row.number:012}"
                if not row.answer.scoring:  # the tokens of a shared prefix are not computed, and have no scores
                    row.version = "base" if row.adapter is None else entry and entry.version
                if self.row_by_row is None:
                    row.space = self._spaces.of(None if row.version is None else (row.version, solo))
                self._rows[row.key] = row
            self._order.submitting += 1
        try:
            for row in rows:
                ids = [self._spaces.enter(token, row.space) for token in row.answer.ids[0].tolist()]
                if self._manager.add_request(ids, row.key, max_new_tokens=row.limit + 1) is None:
                    self._failed(row.key, "the server has failed")  # since the check above
        finally:
            with self._lock:
                self._order.submitting -= 1
            self._manager.cancel_request("")  # wakes the thread up
        if not self.running:  # since the checks above: nothing else would end them
            for row in rows:
                self._failed(row.key, "the server has failed")

    def require_room(self, rows: int) -> None:
        """Check that this many rows can be queued now, besides those of a page.

        Raises:
            ServingError: as `submit`.
        """
        most = self.limits.rows + self.limits.waiting
        allowed = min(most, self.limits.request_answers or most)
        if rows > allowed:
            raise ServingError(400, f"the request asks for {rows} answers: must be at most {allowed}", "n")
        if not self.running:
            raise ServingError(503, SHUTTING_DOWN, code="shutting_down")
        busy = sum(row.bounded for row in [*self._rows.values()])
        if busy + rows > most:
            raise ServingError(
                429,
                f"the server is busy with {busy} of at most {most} answers: send the request again later",
                "n" if rows > 1 else None,
                "rate_limit_exceeded",
            )

    def cancel(self, rows: Sequence[ServedRow]) -> None:
        """Remove rows before the next step. Thread-safe; rows that have ended are left alone."""
        for row in rows:
            row.cancelled = True
            self._manager.cancel_request(row.key)

    def load(self) -> Load:
        """Return what there is to do."""
        rows = [*self._rows.values()]
        running = sum(row.running for row in rows)
        cache = self._cache
        used = cache.num_sectors * cache.bytes_per_sector - cache.compute_free_capacity(relative=False)
        for allocator in cache.cache_allocators.values():  # kept for rows to come, and given up when there is need
            used -= len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
        return Load(running, len(rows) - running, int(used), self._steps.count, self._steps.rows_computed)

    # ---- in the manager's thread ----

    def _step(self, requests: list[FutureRequestState], inputs: dict[str, Any]) -> list[int]:
        if self._stopping:
            self._end_all()
        return self._steps.compute(requests, inputs)

    def _leaving(self) -> list[str]:
        return [key for key, row in [*self._rows.items()] if row.stopped()]

    def _let_go(self, row: ServedRow) -> None:
        """Let go of a row that has ended, or that was cancelled, whose last update is delivered."""
        if not row.answer.finished:
            row.deliver(row.answer.end("stopped"))
        row.held.close()
        self._steps.forward.forget(row.key)
        with self._lock:
            self._rows.pop(row.key, None)
        self._manager.cancel_request(row.key)  # if it has not ended by a token

    def _removed(self, key: str) -> None:
        """Let go of a row that was cancelled and that the manager has removed."""
        row = self._rows.get(key)
        if row is not None:
            self._let_go(row)
            with self.engine.exclusive(step=True):
                self.engine.bank.make_room()

    def _failed(self, key: str, message: str) -> None:
        row = self._rows.get(key)
        if row is not None:
            message, row.status = (SHUTTING_DOWN, 503) if self._stopping else (message, 500)
            update = row.answer.end("error", message)
            self._let_go(row)
            row.deliver(update)

    def _spaces_in_use(self) -> set[int]:
        return {row.space for row in [*self._rows.values()]}

    def _forget_prefixes(self) -> None:
        self._order.forget_prefixes = True

    def _end_all(self) -> None:
        for key in [*self._rows]:
            self._failed(key, SHUTTING_DOWN)
