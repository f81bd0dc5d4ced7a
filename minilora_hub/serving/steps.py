"""Computes the steps of a scheduler: holds the adapters of rows, runs the forward, and lets each row take its token."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers.generation.continuous_batching.requests import FutureRequestState

from minilora_hub.compare.answer import Update
from minilora_hub.compare.batch import forwards_alone
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.errors import AdapterError
from minilora_hub.serving.batching_manager import END
from minilora_hub.serving.forwards import PackedForward, Part, Result, SeparateForward
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.token_spaces import TokenSpaces

UNUSABLE = (AdapterError, ValueError, OSError)
"""Exceptions that mean that an adapter is damaged or missing, or does not fit the base."""


class Steps:
    """Computes the batches that transformers' manager has put together.

    Args:
        engine: the models.
        forward: of its rows.
        spaces: of the ids that the manager has.
        rows: those that have not ended, by the ids of their requests.
        let_go: called with a row that has ended, before its last update is delivered.

    Attributes:
        count: number of steps so far.
        rows_computed: rows of all steps that gave tokens.
    """

    def __init__(
        self,
        engine: CompareEngine,
        forward: PackedForward | SeparateForward,
        spaces: TokenSpaces,
        rows: Mapping[str, ServedRow],
        let_go: Callable[[ServedRow], None],
    ) -> None:
        self._engine, self.forward, self._spaces = engine, forward, spaces
        self._rows, self._let_go = rows, let_go
        self.count = self.rows_computed = 0

    def compute(self, requests: list[FutureRequestState], inputs: dict[str, Any]) -> list[int]:
        """Compute a step, and return the manager's id of a token for each request that needs one.

        Args:
            requests: of the step.
            inputs: arguments of the model's forward, with the tokens of the requests in their order.
        """
        updates: list[tuple[ServedRow, Update]] = []
        with self._engine.exclusive(step=True):
            began = time.perf_counter()
            inputs["input_ids"] = self._spaces.leave(inputs["input_ids"])
            ids = iter(inputs["input_ids"][0].tolist())
            parts = [self._part(each, [next(ids) for _ in range(each.query_length)], updates) for each in requests]
            results = self._results(parts, inputs)
            seconds = time.perf_counter() - began
            computed = [self._rows[part.key].stepped for part in parts if part.key in self._rows]
            for request, part, result in zip(requests, parts, results, strict=True):
                row = self._rows.get(part.key)
                if row is not None and not row.answer.finished and not row.cancelled and result.error is None:
                    taken = self._take(row, part, result, seconds)
                    updates += taken
                    if not any(update.reason == "error" for _, update in taken):
                        continue
                request.complete_blocks = {}  # they may not hold what the row's tokens stand for
                if row is not None and row.cancelled:
                    self._let_go(row)
                elif row is not None and not row.answer.finished:
                    updates.append((row, row.answer.end("error", f"{type(result.error).__name__}: {result.error}")))
            for row, update in updates:
                if update.finished:
                    self._let_go(row)
            self._engine.bank.make_room()
        self.count += 1
        self.rows_computed += len(updates)
        for stepped in dict.fromkeys(computed):
            stepped()
        for row, update in updates:
            row.deliver(update)
        tokens = {row.key: (update.token_id or 0, row.space) for row, update in updates if not update.finished}
        return [self._spaces.enter(*tokens[part.key]) if part.key in tokens else END for part in parts if part.last]

    def _part(self, request: FutureRequestState, ids: list[int], updates: list[tuple[ServedRow, Update]]) -> Part:
        """Describe the tokens of a request, and hold its adapter if this is its first step."""
        key, start = request.state.request_id, request.state.position_offset - len(ids)
        row = self._rows.get(key)
        if row is None or row.cancelled:
            return Part(key, None, None, ids, start, False, request.has_new_token)
        if not row.running:
            row.running = True
            try:
                row.held.enter_context(self._engine.bank.use([row.adapter]))
                self._require_same(row, start)
            except Exception as error:  # a damaged or missing adapter ends only its own rows
                row.status = 400 if isinstance(error, UNUSABLE) else 500
                updates.append((row, row.answer.end("error", f"adapter {row.adapter!r} cannot be used: {error}")))
                return Part(key, None, None, ids, start, False, request.has_new_token)
        return Part(key, row.adapter, row.answer.row.solo_expert, ids, start, row.answer.scoring, request.has_new_token)

    def _require_same(self, row: ServedRow, start: int) -> None:
        """Check that a row whose first tokens were computed for others still has the same adapter."""
        entry = None if row.adapter is None else self._engine.bank.find(row.adapter)
        if start > 0 and entry is not None and entry.version != row.version:
            raise AdapterError("its files were replaced while the answer waited: send the request again")

    def _results(self, parts: list[Part], inputs: dict[str, Any]) -> list[Result]:
        try:
            return self.forward(parts, inputs)
        except Exception as error:  # it cannot be attributed to one row; without this, every client would wait
            return [Result(error=error)] * len(parts)

    @staticmethod
    def _take(row: ServedRow, part: Part, result: Result, seconds: float) -> list[tuple[ServedRow, Update]]:
        if part.every:
            seen = max(len(row.answer.prompt_scores) - 1 - part.start, 0)  # of a row that was put back
            row.answer.score_prompt(part.start + seen, result.logits[seen:])
        if not part.last:
            return []
        alone = forwards_alone(row.answer)
        return [(row, row.answer.take(result.logits[-1], seconds, forwards_alone=alone, **result.experts))]
