"""transformers' continuous batching with our parts: what computes a step, the order of its rows, what hears of ends.

All parts stand at public seams of `ContinuousBatchingManager`: its table of schedulers, its processor's `model_runner`,
and its `output_router`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.requests import (
    FutureRequestState,
    GenerationOutput,
    RequestState,
    RequestStatus,
)
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler

from minilora_hub.errors import ServingError
from minilora_hub.serving.packed_attention import PREFIX, use_packed_attention
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.settings import ServerLimits

STEP_TOKENS = 512
"""The most tokens of all rows in a step."""

NEW_TOKENS, NEW_FOR_EACH = 256, 8
"""The most tokens of prompts in a step while rows generate, and for each of these rows where that is more.

Reading a prompt of many tokens takes about an eighth of the time a token that generating takes in a batch: rows that
generate wait at most about twice as long for a token, unless they are few.
"""

END = 2**31 - 1
"""The end token of every request in the manager: no vocabulary's, it stands for a row that has ended in any way."""

MANY_STREAMS = 16
"""From this many rows on, generating takes a step as long as reading as many tokens of prompts; fewer take less."""

OVERTAKEN = 64
"""How many rows that came later, the first ones of their requests, may overtake a row: it does not wait for ever."""

PAGE = 8
"""Tokens for which a row reserves cache at a time, and of which prompts that begin alike share whole multiples: few
enough for the system turn of a chat template, with which all prompts begin."""


Scheduled = tuple[list[FutureRequestState] | None, bool, int, int]
"""What a scheduler returns: requests of the step, None if the cache is full, and three facts about them."""


class RowsByAdapter(FIFOScheduler):
    """First come, first served, with the rows of a step sorted by their ids, which begin with the adapter.

    The first row of each request overtakes other rows of those before it: whoever asks soon sees that an answer begins.

    While many rows generate, they skip steps if there are prompts to read: one in which only the first rows of requests
    are read, if others wait as well, and one for all. A newcomer's first token then comes as soon as one prompt is
    read, and the rows that generate wait no longer than for a step that does everything.

    Attributes:
        leaving: called before each step; returns the ids of requests to be cancelled.
        removed: called with the id of a cancelled request when it is gone.
        row: returns the row of an id, if it has not ended.
        forget_prefixes: set it to forget, before the next step, the blocks that no running row uses.
        submitting: while it is above 0, no request is begun: those that belong together begin in one step.
    """

    forget_prefixes = False
    submitting = 0
    _skipped = 0  # steps, by rows that generate, since their last one

    leaving: Callable[[], Iterable[str]]
    removed: Callable[[str], None]
    row: Callable[[str], ServedRow | None]

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Scheduled:
        if self.forget_prefixes:
            self.forget_prefixes = False
            self.cache.evict_cached_blocks()
        was_blocked, self.block_new_requests = self.block_new_requests, self.block_new_requests or self.submitting > 0
        self.waiting_requests_order = deque(sorted(self.waiting_requests_order, key=self._place))
        rows, *rest = self._schedule(token_budget, cache_budget)
        self.block_new_requests = was_blocked
        return sorted(rows, key=lambda row: row.state.request_id) if rows else rows, *rest  # type: ignore[return-value]

    def _place(self, key: str) -> tuple[int, bool]:
        row = self.row(key)
        return (0, False) if row is None else (row.number + (0 if row.first else OVERTAKEN), not row.first)

    def _schedule(self, token_budget: int, cache_budget: int) -> Scheduled:
        active = self.active_requests
        streams = {key: state for key, state in active.items() if state.status == RequestStatus.DECODING}
        if not streams:
            return super().schedule_batch(token_budget, cache_budget)
        new = max(NEW_TOKENS, NEW_FOR_EACH * len(streams))
        begun = {key: state for key, state in active.items() if key not in streams}
        waiting = [] if self.block_new_requests else [*self.waiting_requests_order]
        roomy = self.cache.compute_free_capacity() >= self.safety_margin  # else rows that generate come first
        if len(streams) >= MANY_STREAMS and (begun or waiting) and roomy:
            if self._skipped == 2:
                new = 0
            else:
                firsts = [key for key in waiting if (row := self.row(key)) is not None and row.first]
                if self._skipped == 0 and 0 < len(firsts) < len(begun) + len(waiting):
                    begun, waiting, self._skipped = {}, firsts, 1
                else:
                    self._skipped = 2
                batch = self._read(begun, waiting, min(token_budget, new), cache_budget)
                if batch[0]:
                    return batch
        self._skipped = 0
        return super().schedule_batch(min(token_budget, len(streams) + new), cache_budget)

    def _read(
        self, begun: dict[str, RequestState], waiting: list[str], token_budget: int, cache_budget: int
    ) -> Scheduled:
        """Schedule none but these requests."""
        others = {key: state for key, state in self.active_requests.items() if key not in begun}
        queue = self.waiting_requests_order
        self.active_requests, self.waiting_requests_order = begun, deque(waiting)
        try:
            return super().schedule_batch(token_budget, cache_budget)
        finally:
            self.active_requests = others | self.active_requests
            self.waiting_requests_order = deque(key for key in queue if key in self.waiting_requests)

    def clear_cancelled_requests(self) -> list[RequestState]:
        for key in self.leaving():
            self.set_request_cancellation(key)
        cancelled = super().clear_cancelled_requests()
        if cancelled:  # the manager admits nothing after it was short of cache until a request has finished
            self.block_new_requests = False
        for state in cancelled:
            self.removed(state.request_id)
        return cancelled


SCHEDULER_MAPPING[RowsByAdapter.__name__] = RowsByAdapter


class Runner(ModelRunner):
    """Lets `step` compute the tokens of a batch."""

    step: Callable[[list[FutureRequestState], dict[str, Any]], list[int]]

    def compute_batch(self, model: Any, batch_data: dict[str, Any]) -> None:
        batch: Any = self.inputs_and_outputs
        tokens = self.step(batch.requests_in_batch, batch_data)
        batch.output_ids[0, : len(tokens)] = torch.tensor(tokens)


class Failures(OutputRouter):
    """Passes on which requests the manager could not compute; it keeps no outputs."""

    def __init__(self, failed: Callable[[str, str], None]) -> None:
        super().__init__()
        self._failed = failed

    def deliver(self, output: GenerationOutput) -> None:
        if output.error is None:
            return
        self._failed(output.request_id, output.error)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


def build_manager(
    model: Any,
    limits: ServerLimits,
    step: Callable[[list[FutureRequestState], dict[str, Any]], list[int]],
    leaving: Callable[[], Iterable[str]],
    removed: Callable[[str], None],
    failed: Callable[[str, str], None],
    row: Callable[[str], ServedRow | None],
    share_prefixes: bool,
) -> ContinuousBatchingManager:
    """Return a manager, with its cache, that is not started.

    Args:
        model: a model that transformers' continuous batching knows.
        limits: of the server.
        step: computes a batch of requests from the arguments of a forward; a token for each that needs one, or `END`.
        leaving: called before each step; returns the ids of requests to be cancelled.
        removed: called with the id of a cancelled request when it is gone.
        failed: called with the id and the message of a request that the manager ends.
        row: returns the row of an id, if it has not ended.
        share_prefixes: whether rows that begin with the same ids share keys and values, where the base allows it.

    Raises:
        ServingError: there is too little memory for a cache of `limits.cache_tokens`.
        ValueError: the manager does not know this kind of attention or of layers.
    """
    config = ContinuousBatchingConfig(
        page_size=PAGE,
        num_blocks=-(-limits.cache_tokens // PAGE),
        max_batch_tokens=max(STEP_TOKENS, limits.batch_rows),
        max_requests_per_batch=limits.batch_rows,
        allow_block_sharing=share_prefixes,
        use_cuda_graph=False,
        use_async_batching=False,
        scheduler_type=RowsByAdapter.__name__,
    )
    greedy = GenerationConfig(do_sample=False, eos_token_id=END, pad_token_id=0)
    attention = model.config._attn_implementation
    if attention.startswith(PREFIX):  # of a manager before
        attention = attention.removeprefix(PREFIX)
        model.set_attn_implementation(attention)
    manager = ContinuousBatchingManager(model, greedy, config)  # accepts only the kinds of attention that it knows
    manager.output_router = Failures(failed)
    use_packed_attention(model, attention)
    try:
        manager.warmup()  # makes the processor; without graphs there is nothing to warm up
    except (MemoryError, RuntimeError) as error:  # the manager's estimate, and the allocation itself
        message = f"max_cache_tokens={limits.cache_tokens}: a cache of this size does not fit into memory: {error}"
        raise ServingError(400, message) from None
    processor: Any = manager.batch_processor
    order = processor.scheduler
    order.leaving, order.removed, order.row = leaving, removed, row
    runner = Runner(
        processor.logit_processor,
        processor.cb_config,
        processor.inputs_and_outputs,
        processor.cache,
        do_sample=False,
        return_logprobs=False,
    )
    runner.step = step
    processor.model_runner = runner
    return manager
