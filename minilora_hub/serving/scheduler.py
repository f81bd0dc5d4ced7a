"""Continuous batching over the bank: rows of any adapters join and leave the running batch at every step.

transformers' `ContinuousBatchingManager` does the work: its thread, its queues, its paged cache, the choice of the
tokens of a step with long prompts in pieces, cancellation, and waiting where the cache is full. What it has no room for
is added at its public seams:

- A `ModelRunner` of ours, since its own knows one model and one way to choose tokens. Ours says which adapter each
  packed token has, and lets each row's `Answer` choose: seeds and penalties per row, logprobs, logits of a prompt, stop
  strings, routed experts, and errors that end one row.
- A scheduler of ours, in its table of schedulers, sorts the rows of a step by adapter, so that each adapter's tokens
  are adjacent, and says when a cancelled row is gone. Its order of service is that of transformers' `FIFOScheduler`.
- Attention on a CPU: see `packed_attention.py`. Bases whose layers can't tell packed rows apart, which are found by
  trying, run row by row in the same batches: see `forwards.py`.
- Bounds of the queue, since its own blocks the caller where the queue is full.

Blocks of the cache are not shared between rows with a common prefix: the manager's key for a block is its tokens, and
two adapters have different keys and values for the same tokens.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch
import transformers
from packaging.version import Version
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import FutureRequestState

from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.answer import Update
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.errors import AdapterError, ServingError
from minilora_hub.serving.batching_manager import END, PAGE, build_manager
from minilora_hub.serving.forwards import PackedForward, Part, Result, SeparateForward, differs, stand_in
from minilora_hub.serving.rows import Load, ServedRow
from minilora_hub.serving.settings import ServerLimits

PACKS: Final = Version("5.24")
"""The first transformers whose attention is handed the keys that the paged cache has, and not the cache."""

SHUTTING_DOWN = "the server is shutting down"
UNUSABLE = (AdapterError, ValueError, OSError)
"""Exceptions that mean that an adapter is damaged or missing, or does not fit the base."""


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
        self._steps = self._rows_computed = 0
        self.row_by_row = self._try_packed(engine.bank)
        self._forward = (PackedForward if self.row_by_row is None else SeparateForward)(engine.bank)
        if self.row_by_row is not None:
            self._manager = self._build(stand_in())
        processor: Any = self._manager.batch_processor
        self._cache = processor.cache

    def _try_packed(self, bank: AdapterBank) -> str | None:
        """Build the manager for the bank's model; return why its rows can't be packed, or None."""
        if Version(transformers.__version__) < PACKS:
            return f"transformers is {transformers.__version__}, and packs the rows of adapters from {PACKS} on"
        if not getattr(bank.model, "_supports_attention_backend", False):
            return f"{type(bank.model).__name__} has an attention of its own"
        try:
            self._manager = self._build(bank.model)
        except (ValueError, AttributeError) as error:  # the manager refuses some kinds of attention and of layers
            return str(error)
        return differs(bank, self._manager.batch_processor)

    def _build(self, model: Any) -> ContinuousBatchingManager:
        return build_manager(model, self.limits, self._step, self._removed, self._failed)

    def start(self) -> None:
        """Start the thread."""

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
        """Queue the rows of a request, all or none.

        Raises:
            ServingError: the queue is full (429), the request has more rows than ever fit (400), or the server is
                shutting down (503).
        """
        with self._lock:
            self.require_room(len(rows))
            for row in rows:
                entry = None if row.adapter is None else self.engine.bank.find(row.adapter)
                mixture = entry is not None and entry.facts.experts > 0
                row.key = f"{int(mixture)} {row.adapter or ''} {next(self._numbers):012}"
                self._rows[row.key] = row
        for row in rows:
            ids = row.answer.ids[0].tolist()
            if self._manager.add_request(ids, row.key, max_new_tokens=row.limit + 1) is None:
                self._failed(row.key, "the server has failed")  # since the check above

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
        busy = len(self._rows)
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

    def in_use(self) -> Counter[str]:
        """Count the rows of each adapter that run or wait."""
        return Counter(row.adapter for row in [*self._rows.values()] if row.adapter is not None)

    def load(self) -> Load:
        """Return what there is to do."""
        rows = [*self._rows.values()]
        running = sum(row.running for row in rows)
        cache = self._cache
        used = cache.num_sectors * cache.bytes_per_sector - cache.compute_free_capacity(relative=False)
        return Load(running, len(rows) - running, int(used), self._steps, self._rows_computed)

    # ---- in the manager's thread ----

    def _step(self, requests: list[FutureRequestState], inputs: dict[str, Any]) -> list[int]:
        """Compute a step, and return a token for each request that needs one."""
        began = time.perf_counter()
        updates: list[tuple[ServedRow, Update]] = []
        if self._stopping:
            self._end_all()
        with self.engine.exclusive():
            parts, at = [], 0
            ids = inputs["input_ids"][0].tolist()
            for request in requests:
                piece = ids[at : at + request.query_length]
                parts.append(self._part(request, piece, updates))
                at += len(piece)
            results = self._compute(parts, inputs)
            seconds = time.perf_counter() - began
            for part, result in zip(parts, results, strict=True):
                row = self._rows.get(part.key)
                if row is None or row.answer.finished:
                    continue
                if row.cancelled:
                    self._let_go(row)
                    continue
                if result.error is not None:
                    updates.append((row, row.answer.end("error", f"{type(result.error).__name__}: {result.error}")))
                    continue
                if part.every:
                    seen = max(len(row.answer.prompt_scores) - 1 - part.start, 0)  # where the cache was full
                    row.answer.score_prompt(part.start + seen, result.logits[seen:])
                if part.last:
                    updates.append((row, row.answer.take(result.logits[-1], seconds, **result.experts)))
            for row, update in updates:
                if update.finished:
                    self._let_go(row)
            self.engine.bank.make_room()
        self._steps += 1
        self._rows_computed += len(updates)
        for row, update in updates:
            row.deliver(update)
        tokens = {row.key: update.token_id or 0 for row, update in updates if not update.finished}
        ended = [part.key for part in parts if part.key not in self._rows and not part.last]
        for key in ended:
            self._manager.cancel_request(key)
        return [tokens.get(part.key, END) for part in parts if part.last]

    def _part(self, request: FutureRequestState, ids: list[int], updates: list[tuple[ServedRow, Update]]) -> Part:
        """Describe the tokens of a request, and hold its adapter if this is its first step."""
        key, start = request.state.request_id, request.state.position_offset - len(ids)
        row = self._rows.get(key)
        if row is None or row.cancelled:
            return Part(key, None, ids, start, False, request.has_new_token)
        if not row.running:
            row.running = True
            try:
                row.held.enter_context(self.engine.bank.use([row.adapter]))
            except Exception as error:  # a damaged or missing adapter ends only its own rows
                row.status = 400 if isinstance(error, UNUSABLE) else 500
                updates.append((row, row.answer.end("error", f"adapter {row.adapter!r} cannot be used: {error}")))
                return Part(key, None, ids, start, False, request.has_new_token)
        return Part(key, row.adapter, ids, start, row.answer.scoring, request.has_new_token)

    def _compute(self, parts: list[Part], inputs: dict[str, Any]) -> list[Result]:
        try:
            return self._forward(parts, inputs)
        except Exception as error:  # it cannot be attributed to one row; without this, every client would wait
            return [Result(error=error)] * len(parts)

    def _let_go(self, row: ServedRow) -> None:
        row.held.close()
        self._forward.forget(row.key)
        with self._lock:
            self._rows.pop(row.key, None)

    def _removed(self, key: str) -> None:
        """Let go of a row that was cancelled and that the manager has removed."""
        row = self._rows.get(key)
        if row is not None:
            self._let_go(row)
            with self.engine.exclusive():
                self.engine.bank.make_room()

    def _failed(self, key: str, message: str) -> None:
        row = self._rows.get(key)
        if row is not None:
            self._let_go(row)
            message, row.status = (SHUTTING_DOWN, 503) if self._stopping else (message, 500)
            row.deliver(row.answer.end("error", message))

    def _end_all(self) -> None:
        for key in [*self._rows]:
            self._manager.cancel_request(key)
            self._failed(key, SHUTTING_DOWN)
