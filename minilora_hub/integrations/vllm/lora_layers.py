"""vLLM's linears with LoRA, extended by DoRA: y = c * (W x + s B A x) + b, c = m / ||W + s B A|| (arXiv 2402.09353).

Every layer has a table of c, [1 + slots, out], in float32, since bfloat16 would round c by up to 0.4%. The table keeps
its address, as CUDA graphs need, and is indexed by vLLM's own mapping of tokens to slots, plus one. That mapping has -1
for a token without an adapter, so the first row of the table is ones. c is computed and set whenever an adapter is
copied into a slot, since slots are reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA

from minilora_hub.remote_code.adapted_linear import adapted_row_norms

IDENTITY_ROWS = 256


@dataclass
class Batch:
    """What the layers need to know about the current batch; all layers of a model share one object.

    Attributes:
        dora: whether to multiply by c. Always True in a compiled model, which is compiled once for all batches.
        routed: for each MixLoRA in the batch, the indices of its tokens and {path of a block: mixture}.
    """

    dora: bool = True
    routed: list[tuple[Tensor, dict[str, Any]]] = field(default_factory=list)


class SpareSlot:
    """Mixin for a layer with LoRA on a CPU that adds a slot, which stays zero.

    vLLM's CPU kernels use the last slot for index -1, which marks rows without an adapter. With all slots in use, these
    rows would get the adapter in that slot.
    """

    def create_lora_weights(self, max_loras: int, *args: Any, **kwargs: Any) -> None:
        super().create_lora_weights(max_loras + 1, *args, **kwargs)  # type: ignore[misc]


class DoraLayer:
    """Mixin for vLLM's linears with LoRA that adds DoRA. See the module's docstring."""

    dora_scale: Tensor
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    output_slices: tuple[int, ...]
    base_layer: Any
    punica_wrapper: Any
    n_slices: int
    input_size: int
    tp_size: int
    device: Any

    def create_lora_weights(self, max_loras: int, *args: Any, **kwargs: Any) -> None:
        super().create_lora_weights(max_loras, *args, **kwargs)  # type: ignore[misc]
        self.dora_scale = torch.ones(1 + max_loras, sum(self.output_slices), dtype=torch.float32, device=self.device)
        self.batch = Batch()
        self.forget_norms()

    def forget_norms(self) -> None:
        """Discard the cached ||W||^2."""
        self._norms_squared: Tensor | None = None

    def set_dora(self, index: int, magnitudes: list[Tensor | None]) -> None:
        """Set c of a slot, whose A and B are in place.

        Args:
            index: the slot.
            magnitudes: for each slice of the layer its whole m, or None where the adapter has no DoRA there.
        """
        scale = self.dora_scale[1 + index]
        scale.fill_(1.0)
        if all(m is None for m in magnitudes):
            return
        norms = self._adapted_norms(index)
        start = 0
        for m, size in zip(self._on_this_rank(magnitudes), self.output_slices, strict=True):
            if m is not None:
                scale[start : start + size] = m.to(scale) / norms[start : start + size]
            start += size

    @torch.no_grad()
    def weight_norms_squared(self) -> Tensor:
        """Return ||W||^2 of the rows and columns that this rank holds, [out], from the layer's output for the identity.

        The weight itself is not used: vLLM's CPU kernels repack and delete it, and a quantised one is no plain matrix.
        """
        if self._norms_squared is None:
            total = torch.zeros(sum(self.output_slices), dtype=torch.float32, device=self.device)
            for start in range(0, self.input_size, IDENTITY_ROWS):
                count = min(IDENTITY_ROWS, self.input_size - start)
                rows = torch.zeros(count, self.input_size, device=self.device)
                rows.diagonal(offset=start).fill_(1.0)
                total += self._without_bias(rows).square().sum(dim=0)  # (count, out) -> (out)
            self._norms_squared = total
        return self._norms_squared

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = super().apply(x, bias)  # type: ignore[misc]
        if not self.batch.dora:
            return out
        rows = out.view(-1, out.shape[-1])  # (tokens, out)
        slots = self.punica_wrapper._token_lora_indices[: rows.shape[0]]
        # Indices that are never negative, for index_select: on a CPU `dora_scale[slots]` takes three times as long.
        scale = self.dora_scale.index_select(0, slots + 1)  # (tokens, out)
        if bias is None:
            rows.mul_(scale)  # in float32 whatever the dtype of the rows
        else:  # in this form rows with c = 1 keep their exact values
            rows.copy_(rows + (rows.float() - bias) * (scale - 1))
        return out

    @torch.no_grad()
    def _adapted_norms(self, index: int) -> Tensor:
        """||W + s B A|| of every row of this layer, [out]. s is in B by now."""
        squared = []
        start = 0
        for a, b in zip(self.lora_a_stacked, self.lora_b_stacked, strict=True):
            lora_a, lora_b = a[index, 0], b[index, 0]  # (r, in), (out of the slice, r)
            size = lora_b.shape[0]
            weight_a = self._without_bias(lora_a)[:, start : start + size].mT  # (out of the slice, r)
            norms_squared = self.weight_norms_squared()[start : start + size]
            squared.append(adapted_row_norms(norms_squared, weight_a, lora_a, lora_b, 1.0).square())
            start += size
        total = torch.cat(squared)
        if isinstance(self, RowParallelLinearWithLoRA) and self.tp_size > 1:  # this rank has a part of every row
            total = tensor_model_parallel_all_reduce(total)
        return total.sqrt()

    def _without_bias(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.lora_a_stacked[0].dtype)
        return self._get_quant_method().apply(self.base_layer, rows, None).float()  # type: ignore[attr-defined]

    def _on_this_rank(self, magnitudes: list[Tensor | None]) -> list[Tensor | None]:
        """Cut each m as vLLM cuts the rows of B."""
        if self.tp_size == 1 or isinstance(self, RowParallelLinearWithLoRA):
            return magnitudes
        columns = [None if m is None else m[:, None] for m in magnitudes]
        cut = self.slice_lora_b(columns if self.n_slices > 1 else columns[0])  # type: ignore[attr-defined]
        return [None if m is None else m[:, 0] for m in (cut if isinstance(cut, list) else [cut])]
