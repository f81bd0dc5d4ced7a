"""Linear layers whose weights are stored in int8, for answering on a CPU with half the memory of bfloat16.

Each output row of W is stored as round(W / s) with s = max|W| / 127 of that row (row-wise absmax quantization,
arXiv 2208.07339, section 2), and the inputs stay in bfloat16. Up to `PACKED_ROWS` rows are multiplied by torch's own
product with int8 weights, which reads each weight once and makes no copy of it; more rows by a bfloat16 product, which
is then faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKED_ROWS = 8


class Int8Linear(nn.Module):
    """A linear of int8 weights and bfloat16 inputs: (..., in) -> (..., out).

    Args:
        layer: the linear whose weights are stored; it is not changed.

    Attributes:
        weight: int8, [out, in].
        scales: s, bfloat16, [out].
        bias: bfloat16, [out], or None.
        compute_dtype: of the inputs.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None
    compute_dtype = torch.bfloat16

    @torch.no_grad()
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        weight = layer.weight.float()
        largest = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros
        # Rounded first, so that the stored integers fit the scale that multiplies them.
        scales = (largest / 127).to(self.compute_dtype)
        whole = (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", whole)
        self.register_buffer("scales", scales)
        bias = None if layer.bias is None else layer.bias.detach().to(self.compute_dtype)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; x has dtype bfloat16."""
        rows = x.reshape(-1, self.in_features)
        if rows.shape[0] <= PACKED_ROWS:
            out = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scales)
        else:
            out = F.linear(rows, self.weight.to(x.dtype)).mul_(self.scales)
        if self.bias is not None:
            out += self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def store_in_int8(model: nn.Module) -> None:
    """Replace every linear of a bfloat16 model by an `Int8Linear`, in place, the head included.

    Embeddings, norms and convolutions stay as they are.

    Raises:
        ValueError: most weights of its layers are not in linears of bfloat16 on a CPU, as those of GPT-2's Conv1D or
            of stacked experts; the message names the largest that is not. Nothing is changed then.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child.weight.is_cpu and child.weight.dtype is torch.bfloat16
    ]
    _require_mostly(model, {id(child.weight) for _, _, child in found})
    stored: dict[nn.Module, Any] = {}  # a linear may be in several places
    for parent, name, child in found:
        if child not in stored:
            stored[child] = Int8Linear(child)
        setattr(parent, name, stored[child])


def _require_mostly(model: nn.Module, linears: set[int]) -> None:
    """Check that linears hold most of the weights that are multiplied with; their ids are given."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {name: weight for name, weight in model.named_parameters() if weight.dim() > 1}
    others = {name: w for name, w in weights.items() if id(w) not in linears and id(w) not in embeddings}
    stored = sum(weight.numel() for weight in weights.values() if id(weight) in linears)
    if stored <= sum(weight.numel() for weight in others.values()) or not stored:
        largest = max(others, key=lambda name: others[name].numel(), default="none of its weights")
        raise ValueError(
            f"dtype='int8': is for bases whose weights are linears in bfloat16 on a CPU; {largest} is not one: use "
            "bfloat16"
        )
