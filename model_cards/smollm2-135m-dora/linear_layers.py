"""What an adapter needs to know of a base's linear layer, of any make: plain, quantised, offloaded or Conv1D.

A layer is called, never unpacked. Only `plain_weight` looks at its weight, and only where it lies open in memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .few_rows import few_rows_linear, remember_weights

_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global_forward{when}_hooks", {}) for when in ("", "_pre"))


def linear_shape(layer: Any) -> tuple[int, int] | None:
    """(out_features, in_features) of a linear layer; None if `layer` is not one."""
    for out_name, in_name in (("out_features", "in_features"), ("outfeatures", "infeatures"), ("nf", "nx")):
        out_features, in_features = getattr(layer, out_name, None), getattr(layer, in_name, None)
        if isinstance(out_features, int) and isinstance(in_features, int):
            return out_features, in_features
    return None


def plain_weight(layer: nn.Module) -> Tensor | None:
    """The layer's weight as a float tensor [out, in]; None where it is quantised or offloaded."""
    weight: Any = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight) not in (nn.Parameter, Tensor):
        return None
    if weight.is_meta or not weight.is_floating_point() or tuple(weight.shape) != linear_shape(layer):
        return None
    return weight


def is_split(tensor: Any) -> bool:
    """Whether a tensor is a part of a larger one over several processes: by FSDP2, a tensor-parallel plan or ZeRO-3."""
    return hasattr(tensor, "device_mesh") or hasattr(tensor, "ds_id")


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor that FSDP2 or DeepSpeed's ZeRO-3 may have split, whole: every process must ask for it."""
    if hasattr(tensor, "ds_id"):
        with import_module("deepspeed").zero.GatheredParameters(tensor):  # transformers would require an import
            return tensor.detach().clone()
    return tensor.full_tensor() if is_split(tensor) else tensor


def parted_as(parameter: Any, whole: Tensor) -> Tensor:
    """Split a tensor as FSDP2 has split a parameter, if it has: every process must ask for it."""
    if not is_split(parameter):
        return whole
    parts = import_module("torch.distributed.tensor").distribute_tensor  # not in every torch
    return parts(whole.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements)


@contextmanager
def whole_weights(base: nn.Module, path: str) -> Iterator[None]:
    """Have the weights at a path whole, in a `with` block, if FSDP2 has split `base`: every process must enter it."""
    around: list[Any] = [base.get_submodule(path.rsplit(".", up)[0]) for up in range(path.count(".") + 1)]
    groups = [module for module in [*around, base] if hasattr(module, "unshard")][:1]
    try:
        for group in groups:
            group.unshard()
        yield
    finally:
        for group in groups:
            group.reshard()


def layer_device(layer: Any) -> torch.device:
    """The device on which `layer` computes, also where its weights are offloaded."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if device is None:
        tensor = next(layer.parameters(), None)
        return (next(layer.buffers()) if tensor is None else tensor).device
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def compute_dtype(layer: nn.Module) -> torch.dtype:
    """The dtype of the inputs of `layer`: its weight's, or the compute dtype of a quantised layer."""
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        return weight.dtype
    return getattr(layer, "compute_dtype", None) or torch.get_default_dtype()


def keep_4bit_weights_exact(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU when they are first used in eval mode.

    The repacked form is rounded (absmax to bf16), its kernel computes in bf16 and has no backward, and it stays when
    training continues: base outputs would change by about 1%, and gradients would silently be wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            quantised: Any = module
            quantised.support_avx512bf16_for_cpu = False
            if getattr(quantised.weight.quant_state, "packing_format_for_cpu", False):
                quantised.state_dict()  # bitsandbytes' own way back to the ordinary layout


@torch.no_grad()
def apply_without_bias(layer: nn.Module, rows: Tensor) -> Tensor:
    """W applied to each row: (..., in) -> (..., out), in fp32."""
    out = layer(rows.to(device=layer_device(layer), dtype=compute_dtype(layer))).float()
    bias = getattr(layer, "bias", None)
    return out if bias is None else out - bias.to(out)


@torch.no_grad()
def row_norms_squared(layer: Any, chunk: int = 512) -> Tensor:
    """||W||^2 of each output row: […, out], fp32. A weight that is not plain is read through chunks of the identity."""
    weight = plain_weight(layer) if isinstance(layer, nn.Module) else layer.weight  # of stacked experts
    if weight is not None:
        return torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float32).square()
    shape = linear_shape(layer)
    assert shape is not None
    out_features, in_features = shape
    device = layer_device(layer)
    total = torch.zeros(out_features, device=device)
    for start in range(0, in_features, chunk):
        rows = torch.zeros(min(chunk, in_features - start), in_features, device=device)
        rows.diagonal(offset=start).fill_(1.0)
        total += apply_without_bias(layer, rows).square().sum(dim=0)  # (chunk, out) -> (out)
    return total


def may_overwrite_output(layer: nn.Module) -> bool:
    """Whether a result of `layer` may be written to: no hook reads it, and no gradient needs it.

    The gradient of a plain linear needs its input and weight only; another kind of layer may need its output.
    """
    return not _has_hooks(layer) and (not torch.is_grad_enabled() or _is_plain(layer))


def is_only_its_product(layer: nn.Module) -> bool:
    """Whether calling `layer` now is `F.linear` only, so that `only_product_of` may take its place."""
    plain = _is_plain(layer) and not torch.is_grad_enabled() and not _has_hooks(layer)
    return plain and not torch.compiler.is_compiling()


def only_product_of(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of a layer for which `is_only_its_product` holds, a new tensor: few rows in the fastest way.

    It skips the module's call and look-ups of its attributes, which cost as much as a small product.
    """
    weight: Any = layer._parameters["weight"]
    return few_rows_linear(x, weight, layer._parameters["bias"])


def _is_plain(layer: nn.Module) -> bool:
    """Whether it computes what nn.Linear does: it is one, and its forward was not replaced (as to fetch weights)."""
    plain = type(layer) in (nn.Linear, FewRowsLinear) and "forward" not in layer.__dict__
    return plain and not hasattr(layer._parameters["weight"], "__tensor_flatten__")  # as torchao's quantized weights


def _has_hooks(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or any(_GLOBAL_HOOKS))


class FewRowsLinear(nn.Linear):
    """An `nn.Linear` that multiplies few rows in the fastest way at inference: see `few_rows.py`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        if self.training or not is_only_its_product(self):
            return F.linear(x, self.weight, self.bias)
        return only_product_of(self, x)


def speed_up_linears(model: nn.Module) -> None:
    """Make every plain linear of `model` a `FewRowsLinear`: the same module, tensors and hooks, of another class."""
    remember_weights(model)
    for module in model.modules():
        if type(module) is nn.Linear and _is_plain(module):
            module.__class__ = FewRowsLinear


def restore_linears(model: nn.Module) -> None:
    """Undo `speed_up_linears`."""
    for module in [module for module in model.modules() if type(module) is FewRowsLinear]:
        module.__class__ = nn.Linear  # type: ignore[assignment]
