"""Updates of one linear by adapters, alone or stacked: adjacent groups of few rows are then computed together.

With one or few rows an adapter, starting products takes longer than computing them. So the A and the B of the adapters
of a batch are copied into two tensors, and all of them are one batched product each. The copies are made once for a
set of adapters that stays for more than one forward, and kept as long as it stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from minilora_hub.remote_code.adapted_linear import AdaptedLinear, add_low_rank_, apply_dora_scale_, product_dtype


class LinearUpdate(NamedTuple):
    """Update of one linear by one adapter: A [r, in], B [out, r], s, and DoRA's c [out] or None.

    B is a view of B^T, with which few rows are multiplied faster.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    scale: torch.Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, adapted: AdaptedLinear) -> LinearUpdate:
        """Return the tensors of an adapted linear; c is computed once, because nothing is trained here."""
        update = adapted.update
        scale = None if update.magnitude is None else update.scale(adapted.base_layer).detach()
        lora_b = update.lora_B.detach().mT.contiguous().mT
        return cls(update.lora_A.detach(), lora_b, update.scaling, scale)

    def add_to_(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Add the update in place: `out` is the base's output, (tokens, out), with its `bias`, and `x` (tokens, in)."""
        add_low_rank_(out, x, self.lora_a, self.lora_b, self.scaling)
        if self.scale is not None:
            apply_dora_scale_(out, self.scale, bias)


class StackedUpdates(NamedTuple):
    """Updates of one linear by n adapters: A^T [n, in, r], s B^T [n, r, out], and c [n, 1, out] or None.

    A smaller rank is filled with zeros, and c is 1 for an adapter without one.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: torch.Tensor | None

    @classmethod
    @torch.inference_mode(False)  # a batch with gradients may use them later
    @torch.no_grad()
    def of(cls, updates: Sequence[LinearUpdate]) -> StackedUpdates:
        """Copy the tensors of updates."""
        first, rank = updates[0], max(len(update.lora_a) for update in updates)
        lora_a = first.lora_a.new_zeros(len(updates), rank, first.lora_a.shape[1])
        lora_b = first.lora_b.new_zeros(len(updates), rank, len(first.lora_b))
        for a, b, update in zip(lora_a, lora_b, updates, strict=True):
            r = len(update.lora_a)
            a[:r] = update.lora_a
            torch.mul(update.lora_b.mT, update.scaling, out=b[:r])
        scale = None
        if any(update.scale is not None for update in updates):
            ones = torch.ones(len(first.lora_b), device=lora_b.device)
            scale = torch.stack([ones if update.scale is None else update.scale for update in updates]).unsqueeze(1)
        return cls(lora_a.mT, lora_b, scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return self.lora_a.nbytes + self.lora_b.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def add_to_(self, out: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """As `LinearUpdate.add_to_`; the tokens of each adapter follow those of the one before, as many of each."""
        count = len(self.lora_b)
        out, x = out.view(count, -1, out.shape[-1]), x.reshape(count, -1, x.shape[-1])  # each (n, tokens, …)
        dtype = product_dtype(out, x[0], self.lora_a)
        lora_a, lora_b = self.lora_a.to(dtype), self.lora_b.to(dtype)
        hidden = torch.bmm(x.to(dtype), lora_a)  # (n, tokens, r)
        if out.dtype == dtype:
            out.baddbmm_(hidden, lora_b)
        else:
            out.add_(torch.bmm(hidden, lora_b))
        if self.scale is not None:
            apply_dora_scale_(out, self.scale, bias)
