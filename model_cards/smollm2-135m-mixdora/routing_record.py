"""What the routers decide: the routes of one call, and the record of a whole forward, which also knows its padding."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Routes(NamedTuple):
    """Where the tokens of one call go.

    Attributes:
        weights: (tokens, K), fp32; 0 where a slot is not kept.
        selected: expert of each slot, (tokens, K); a valid index also where a slot is not kept.
        kept: which slots there are, (tokens, K), bool. None: all.
        passed: weight with which a token's own input is its output, (tokens, 1), fp32. None: no token passes.
    """

    weights: Tensor
    selected: Tensor
    kept: Tensor | None = None
    passed: Tensor | None = None


@dataclass
class RoutingRecord:
    """What the routers of one forward decided, one entry for each router, in the order in which they ran.

    Attributes:
        logits: router logits, (batch, seq, experts), fp32.
        selected: indices of the chosen experts, (batch, seq, K), the most probable first; -1 in the slots of top_p that
            the token did not need, and for a token that switch let pass over an expert's capacity.
        weights: their weights, (batch, seq, K), fp32; 0 where the index is -1.
        layers: canonical names of the decoder layers, which is the same for the routers of one layer's linears.
        token_mask: (batch, seq), 0 on padding, which takes no capacity in training. Given by the caller, or None.
        shape: (batch, seq) of the tokens, for bases that flatten them; the mask's by default. None: not known.
    """

    logits: list[Tensor] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    token_mask: Tensor | None = None
    shape: torch.Size | None = None


_RECORD: ContextVar[RoutingRecord | None] = ContextVar("minilora_routing_record", default=None)
# torch.compile cannot trace a ContextVar; a compiled forward runs in one thread.
_COMPILED_RECORD: list[RoutingRecord | None] = [None]


@contextmanager
def record_routing(token_mask: Tensor | None = None, shape: torch.Size | None = None) -> Iterator[RoutingRecord]:
    """Record the routing of every mixture that runs inside: ``with record_routing() as record: model(...)``.

    The record belongs to this thread's context, and is closed when the block ends, so a forward that gradient
    checkpointing repeats during backward adds nothing to it.
    """
    shape = token_mask.shape if shape is None and token_mask is not None else shape
    record = RoutingRecord(token_mask=token_mask, shape=shape)
    if torch.compiler.is_compiling():
        _COMPILED_RECORD[0] = record
        try:
            yield record
        finally:
            _COMPILED_RECORD[0] = None
    else:
        token = _RECORD.set(record)
        try:
            yield record
        finally:
            _RECORD.reset(token)


def current_record() -> RoutingRecord | None:
    """The open record of this context, or None."""
    return _COMPILED_RECORD[0] if torch.compiler.is_compiling() else _RECORD.get()


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for torch.utils.checkpoint: a repeated forward sees the padding that the first one saw.

    Switch routing needs it in training with padding, which takes no capacity: the forward is repeated in backward, when
    its record is closed, possibly in another thread.
    """
    record = current_record()
    return nullcontext(), nullcontext() if record is None else record_routing(record.token_mask, record.shape)
