"""LoRA and DoRA on one linear layer: the equations as functions on tensors, and a thin module over them.

LoRA (arXiv 2106.09685):       y = W x + b + s B A x
DoRA (arXiv 2402.09353, eq. 5): y = c * (W x + s B A x) + b,   c = m / ||W + s B A||, the norm taken per output row

W [out, in] and b [out] are the base layer, which is only ever called, so it may be quantised or offloaded. A [r, in]
and B [out, r] are `lora_A` and `lora_B`, s is `scaling`, m [out] is `magnitude`. The norm is detached from the
gradient (the paper's section 4.3).

How this differs from other implementations: B A is never formed. With ||W||^2 per row known once,

    ||W + s B A||^2 = ||W||^2 + 2 s rowsum(B * (W A^T)) + s^2 rowsum((B (A A^T)) * B)

where W A^T is the base layer applied to the r rows of A. At inference only c [out] is kept, until a weight changes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Conv1D

from .few_rows import MOST_ROWS
from .linear_layers import (
    apply_without_bias,
    is_only_its_product,
    linear_shape,
    may_overwrite_output,
    only_product_of,
    plain_weight,
)

TINY_NORM = 1e-12
"""Smallest row norm that is divided by: a base row of zeros then gives zeros, not NaN."""


def adapted_row_norms(
    weight_norms_squared: Tensor, weight_a: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """||W + s B A|| per output row, from its three terms (see the head of this file).

    Args:
        weight_norms_squared: ||W||^2, [out], fp32.
        weight_a: W A^T, [..., out, r], fp32. A leading axis may hold experts.
        lora_a: A, [..., r, in].
        lora_b: B, [..., out, r].
        scaling: s.

    Returns: [..., out], fp32, at least `TINY_NORM`.
    """
    a, b = lora_a.float(), lora_b.float()
    cross = (b * weight_a).sum(dim=-1)  # (..., out)
    square = ((b @ (a @ a.mT)) * b).sum(dim=-1)  # (..., out)
    # Rounding can make a sum of squares negative only where it is zero.
    return (weight_norms_squared + 2 * scaling * cross + scaling**2 * square).clamp_min(TINY_NORM**2).sqrt()


@torch.no_grad()  # DoRA detaches the norm
def dora_norms(
    layer: nn.Module, weight_norms_squared: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float
) -> Tensor:
    """||W + s B A|| per output row for the base `layer`: [..., out]."""
    with torch.autocast(lora_a.device.type, enabled=False):  # a norm in bf16 would be off by 0.4%
        weight_a = apply_without_bias(layer, lora_a).mT  # (..., r, out) -> (..., out, r)
        return adapted_row_norms(weight_norms_squared, weight_a, lora_a, lora_b, scaling)


def product_dtype(out: Tensor, x: Tensor, lora_a: Tensor) -> torch.dtype:
    """The dtype of the products with A and B, which add to `out`: bfloat16 where the base computes in it, else A's own.

    So float32 adapters on a bfloat16 base are rounded where they are used, as under autocast, and learn in float32;
    casting the activations to float32 instead would cost more than the products. (Not in float16, whose small range
    needs a scaled loss.) With few rows on a CPU it is the other way round: starting a bfloat16 product takes several
    times as long as the whole float32 one. `out` is the output of the base, (..., out), and x its input, (..., in).
    """
    if out.dtype != torch.bfloat16:
        return lora_a.dtype
    few = x.is_cpu and x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled()
    return lora_a.dtype if few and not torch.compiler.is_compiling() else torch.bfloat16


def add_low_rank(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """out + s B A x, in the dtype of `out`, which is (..., out); `x` is (..., in)."""
    dtype = product_dtype(out, x, lora_a)
    x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    hidden = F.linear(x, lora_a)  # (..., r)
    if not out.dtype == hidden.dtype == lora_b.dtype:
        return out + (F.linear(hidden, lora_b) * scaling).to(out.dtype)
    return torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), lora_b.mT, alpha=scaling).view_as(out)


def add_low_rank_(out: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    """`add_low_rank` in place: `out` is (rows, out) and `x` (rows, in)."""
    if not out.dtype == x.dtype == lora_a.dtype == lora_b.dtype:
        dtype = product_dtype(out, x, lora_a)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    hidden = F.linear(x, lora_a)  # (rows, r)
    if out.dtype == hidden.dtype == lora_b.dtype:
        out.addmm_(hidden, lora_b.mT, alpha=scaling)
    else:
        out.add_(F.linear(hidden, lora_b), alpha=scaling)


def apply_dora_scale(out: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """c * (out - b) + b: the base's bias is left out of the decomposition. `scale` is c, broadcast over (..., out)."""
    scale = scale.to(out.dtype)
    return out * scale if bias is None else torch.addcmul(bias, out - bias, scale)


def apply_dora_scale_(out: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    """`apply_dora_scale` in place."""
    if bias is None:
        out.mul_(scale)
    else:
        out.sub_(bias).mul_(scale).add_(bias)


class LowRankUpdate(nn.Module):
    """The tensors of one LoRA or DoRA update, or of a stack of them with a leading expert axis.

    Attributes:
        lora_A: [..., r, in].
        lora_B: [..., out, r].
        magnitude: [..., out], fp32, or None for plain LoRA.
        scaling: s.
        weight_norms_squared: ||W||^2 of the base, [out], fp32; None for plain LoRA. Not saved.
    """

    magnitude: nn.Parameter | None
    weight_norms_squared: Tensor | None

    def __init__(
        self,
        lora_a: Tensor,
        lora_b: Tensor,
        magnitude: Tensor | None,
        scaling: float,
        dropout: float,
        weight_norms_squared: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude.float()))
        self.register_buffer("weight_norms_squared", weight_norms_squared, persistent=False)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self._forget()

    def _forget(self) -> None:
        """Empty the caches of inference: c and the weights it belongs to, the experts and the stacks they view."""
        self._scale_cache: tuple[Any, Any] = (None, None)
        self._experts_cache: tuple[Any, Any] = (None, None)

    def scale(self, layer: nn.Module) -> Tensor:
        """c = m / ||W + s B A||: [..., out], fp32. At inference it is kept until a weight changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._scale_cache = (None, None)
            return self._compute_scale(layer)
        key = self._weights_key()
        if key is None or key != self._scale_cache[0]:
            self._scale_cache = (key, self._compute_scale(layer))
        return self._scale_cache[1]

    def _compute_scale(self, layer: nn.Module) -> Tensor:
        magnitude: Any = self.magnitude
        norms_squared: Any = self.weight_norms_squared
        return magnitude / dora_norms(layer, norms_squared, self.lora_A, self.lora_B, self.scaling)

    def experts(self, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A [r, in] and B [out, r] of each expert of a stack, in `dtype`. At inference the views are kept."""
        # `_parameters` avoids the attribute look-ups of nn.Module: this runs for each layer and token.
        a: Any = self._parameters["lora_A"]
        b: Any = self._parameters["lora_B"]
        # With gradients unbind, not indexing: its backward is one stack, and an expert without tokens gets zeros.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not a.dtype == b.dtype == dtype:
            return a.to(dtype).unbind(), b.to(dtype).unbind()
        key = (a.data_ptr(), b.data_ptr())
        if self._experts_cache[0] != key:
            self._experts_cache = (key, (a.unbind(), b.unbind()))
        return self._experts_cache[1]

    def _weights_key(self) -> tuple[int, ...] | None:
        """A key that changes when a weight is replaced or written to; None where torch does not count writes."""
        a: Any = self._parameters["lora_A"]
        b: Any = self._parameters["lora_B"]
        m: Any = self.magnitude
        try:
            return a.data_ptr(), b.data_ptr(), m.data_ptr(), a._version, b._version, m._version
        except RuntimeError:  # made in inference mode
            return None

    def _apply(self, fn: Callable, recurse: bool = True) -> "LowRankUpdate":
        """Move and cast as usual, but keep what DoRA divides by in fp32: in bf16 the magnitude is off by 0.4%."""
        kept = {name: getattr(self, name) for name in ("magnitude", "weight_norms_squared")}
        exact = {name: tensor.detach() for name, tensor in kept.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = tensor.to(moved.device)
        self._forget()
        return self


class AdaptedLinear(nn.Module):
    """A base linear with a LoRA or DoRA update on it: (..., in) -> (..., out).

    Args:
        base_layer: any linear the base brings. It is called, never unpacked.
        update: its `LowRankUpdate`.
    """

    def __init__(self, base_layer: nn.Module, update: LowRankUpdate) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.update = update

    # Some models read these from their projections (flash attention looks at the weight's dtype).
    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        return linear_shape(self.base_layer)[1]  # type: ignore[index]

    @property
    def out_features(self) -> int:
        return linear_shape(self.base_layer)[0]  # type: ignore[index]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer, update = self.base_layer, self.update
        is_product = not (self.training or args or kwargs) and is_only_its_product(layer)
        if is_product and x.numel() == x.shape[-1]:
            return self._one_row(layer, update, x)
        if args or kwargs or not may_overwrite_output(layer):
            out = layer(x, *args, **kwargs)
            x = update.dropout(x) if self.training else x
            out = add_low_rank(out, x, update.lora_A, update.lora_B, update.scaling)
            return out if update.magnitude is None else apply_dora_scale(out, update.scale(layer), self.bias)
        rows = x.reshape(-1, x.shape[-1])  # the product then is no view, which autograd would copy to write to it
        out = only_product_of(layer, rows) if is_product else layer(rows)
        rows = update.dropout(rows) if self.training else rows
        add_low_rank_(out, rows, update.lora_A, update.lora_B, update.scaling)
        if update.magnitude is not None and torch.is_grad_enabled():  # the gradient of c needs what c multiplies
            out = apply_dora_scale(out, update.scale(layer), self.bias)
        elif update.magnitude is not None:
            apply_dora_scale_(out, update.scale(layer), self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _one_row(self, layer: nn.Module, update: LowRankUpdate, x: Tensor) -> Tensor:
        """Decode one token, where starting kernels and looking up attributes take longer than the products.

        In float32 a row is a vector: products with it start in half the time of those with a matrix of one row.
        """
        lora_a: Any = update._parameters["lora_A"]
        lora_b: Any = update._parameters["lora_B"]
        out = only_product_of(layer, x)
        row = out.view(-1)
        if out.dtype == x.dtype == lora_a.dtype == lora_b.dtype == torch.float32:
            row.addmv_(lora_b, torch.mv(lora_a, x.reshape(-1)), alpha=update.scaling)
        else:
            add_low_rank_(row.unsqueeze(0), x.reshape(1, -1), lora_a, lora_b, update.scaling)
        if update.magnitude is not None:
            apply_dora_scale_(row, update.scale(layer), layer._parameters["bias"])
        return out

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """{"weight": c * (W + s B A)} in the base weight's dtype and layout, which is [in, out] in a Conv1D.

        Raises:
            ValueError: the base weight is quantised or offloaded.
        """
        transposed = isinstance(self.base_layer, Conv1D) and not self.base_layer.weight.is_meta
        weight = self.weight.mT if transposed else plain_weight(self.base_layer)
        if weight is None:
            raise ValueError(
                f"cannot merge into a {type(self.base_layer).__name__} (quantised, offloaded or not a plain linear): "
                "load the base without quantization_config and device_map offload, then merge"
            )
        update = self.update
        merged = weight.float() + update.scaling * (update.lora_B.float() @ update.lora_A.float())
        if update.magnitude is not None:
            merged *= update.scale(self.base_layer)[:, None]
        return {"weight": (merged.mT if transposed else merged).to(weight.dtype)}
