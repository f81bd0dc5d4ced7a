"""What a term of the loss is computed from, and what it returns; see `objectives` and `preference`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Step:
    """A micro-batch that is being trained, or validated.

    Attributes:
        model: the adapted model.
        inputs: what it was called with.
        hidden: the decoder's last hidden states of that call, (batch, seq, d).
        place: (optimizer step, micro-batch in it, numbered over all processes).
        log_probs: log-probability of each label, 0 where there is none, (batch, seq - 1).
    """

    model: Any
    inputs: dict[str, Any]
    hidden: torch.Tensor
    place: tuple[int, int]
    log_probs: torch.Tensor | None = None


@dataclass(frozen=True)
class Term:
    """A term of the loss: its `value`, and the labels it is the mean of; None where it depends on no label."""

    value: torch.Tensor
    labels: torch.Tensor | None = None


class Objective(Protocol):
    """A term of the loss, and a call that computes it.

    Attributes:
        name: in the log.
        weight: of the term.
        label_weight: factor of the ordinary loss beside it.
        validates: whether it is also a part of the validation loss.
    """

    name: str
    weight: float
    label_weight: float
    validates: bool

    def __call__(self, step: Step) -> Term: ...


class Forward:
    """What is recorded of a forward pass of a causal LM with TRL's fused head; see `Step`."""

    hidden: torch.Tensor
    log_probs: torch.Tensor


@contextmanager
def recorded(model: Any, wanted: bool = True) -> Iterator[Forward]:
    """Record the forward pass that runs in the block, where `wanted`."""
    found, handles = Forward(), []
    if wanted:
        decoder, whole = (
            lambda module, args, outputs: setattr(found, "hidden", outputs.last_hidden_state),
            lambda module, args, outputs: setattr(found, "log_probs", outputs.log_probs),
        )
        handles = [model.base_model.register_forward_hook(decoder), model.register_forward_hook(whole)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def labels_scored_only() -> Iterator[None]:
    """Make TRL's fused head compute logits only at positions with a label, on every device.

    TRL does so if Triton is available. Otherwise it uses all positions, for devices that recompile for each shape,
    which a CPU does not. The Triton kernels have a separate copy of the function that is replaced here.
    """
    from trl.trainer import utils

    if torch.cuda.is_available():
        yield
        return
    before = utils._use_triton
    utils._use_triton = lambda device: device.type == "cpu" or before(device)
    try:
        yield
    finally:
        utils._use_triton = before
