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

import torch
from torch import nn
from torch.nn import functional as F

TINY_NORM = 1e-12
"""Smallest row norm that is divided by: a base row of zeros then gives zeros, not NaN."""


def linear_shape(layer):
    """(out_features, in_features) of a linear layer of any make, or None if `layer` is not one."""
    for out_name, in_name in (("out_features", "in_features"), ("outfeatures", "infeatures"), ("nf", "nx")):
        out_features, in_features = getattr(layer, out_name, None), getattr(layer, in_name, None)
        if isinstance(out_features, int) and isinstance(in_features, int):
            return out_features, in_features
    return None


def plain_weight(layer):
    """The layer's weight as a float tensor [out, in] if it lies open in memory, else None (quantised, offloaded)."""
    weight = getattr(layer, "weight", None)
    if not isinstance(layer, nn.Linear) or type(weight) not in (nn.Parameter, torch.Tensor):
        return None
    if weight.is_meta or not weight.is_floating_point() or tuple(weight.shape) != linear_shape(layer):
        return None
    return weight


def layer_device(layer):
    """The device on which `layer` computes, also when its weights are offloaded."""
    hook = getattr(layer, "_hf_hook", None)
    execution_device = getattr(hook, "execution_device", None)
    if execution_device is not None:
        return (
            torch.device("cuda", execution_device)
            if isinstance(execution_device, int)
            else torch.device(execution_device)
        )
    tensor = next(layer.parameters(), None)
    if tensor is None:
        tensor = next(layer.buffers())
    return tensor.device


def compute_dtype(layer):
    """The dtype in which inputs are handed to `layer`: its weight's, or the compute dtype of a quantised one."""
    weight = getattr(layer, "weight", None)
    if weight is not None and weight.is_floating_point() and weight.element_size() > 1:
        return weight.dtype
    return getattr(layer, "compute_dtype", None) or torch.get_default_dtype()


def keep_4bit_weights_exact(model):
    """Keep bitsandbytes from repacking 4-bit weights on a CPU when they are first used in eval mode.

    The repacked form is rounded (absmax to bf16), its kernel computes in bf16 and has no backward, and it stays when
    training goes on: base outputs would change by about 1%, and gradients would silently be wrong.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                module.state_dict()  # bitsandbytes' own way back to the ordinary layout


@torch.no_grad()
def apply_without_bias(layer, rows):
    """W applied to each row of `rows`: (..., in) -> (..., out), in fp32. The base layer is called, never unpacked."""
    out = layer(rows.to(device=layer_device(layer), dtype=compute_dtype(layer))).float()
    bias = getattr(layer, "bias", None)
    return out if bias is None else out - bias.to(out)


@torch.no_grad()
def row_norms_squared(layer, chunk=512):
    """||W||^2 of each output row: [out], fp32. A weight that is not open is read through chunks of the identity."""
    weight = plain_weight(layer)
    if weight is not None:
        return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    out_features, in_features = linear_shape(layer)
    device = layer_device(layer)
    total = torch.zeros(out_features, device=device)
    for start in range(0, in_features, chunk):
        rows = torch.zeros(min(chunk, in_features - start), in_features, device=device)
        rows.diagonal(offset=start).fill_(1.0)
        total += apply_without_bias(layer, rows).square().sum(dim=0)  # (chunk, out) -> (out)
    return total


def adapted_row_norms(weight_norms_squared, weight_a, lora_a, lora_b, scaling):
    """||W + s B A|| per output row, from its three terms (see the head of this file).

    Args:
        weight_norms_squared: ||W||^2, [out], fp32.
        weight_a: W A^T, [..., out, r], fp32.
        lora_a: A, [..., r, in]. A leading axis may hold experts.
        lora_b: B, [..., out, r].
        scaling: s.

    Returns:
        [..., out], fp32, at least `TINY_NORM`.
    """
    a, b = lora_a.float(), lora_b.float()
    cross = (b * weight_a).sum(dim=-1)  # (..., out)
    square = ((b @ (a @ a.mT)) * b).sum(dim=-1)  # (..., out)
    # Rounding can push a sum of squares below zero only where it is zero.
    return (weight_norms_squared + 2 * scaling * cross + scaling**2 * square).clamp_min(TINY_NORM**2).sqrt()


@torch.no_grad()
def dora_norms(layer, weight_norms_squared, lora_a, lora_b, scaling):
    """||W + s B A|| per output row for the base `layer`: [..., out]. Outside the graph: DoRA detaches the norm."""
    with torch.autocast(lora_a.device.type, enabled=False):  # a norm in bf16 would be off by 0.4%
        weight_a = apply_without_bias(layer, lora_a).mT  # (..., r, out) -> (..., out, r)
        return adapted_row_norms(weight_norms_squared, weight_a, lora_a, lora_b, scaling)


def product_dtype(out, lora_a):
    """The dtype of the products with A and B, which add to `out`: bfloat16 where the base computes in it, else A's own.

    So float32 adapters on a bfloat16 base are rounded where they are used, as under autocast, and learn in float32;
    casting the activations to float32 instead would cost more than the products. (Not in float16, whose small range
    needs a scaled loss.)
    """
    return torch.bfloat16 if out.dtype == torch.bfloat16 else lora_a.dtype


def add_low_rank(out, x, lora_a, lora_b, scaling):
    """out + s B A x, in the dtype of `out`, which is (..., out); `x` is (..., in)."""
    dtype = product_dtype(out, lora_a)
    x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    hidden = F.linear(x, lora_a)  # (..., r)
    if not out.dtype == hidden.dtype == lora_b.dtype:
        return out + (F.linear(hidden, lora_b) * scaling).to(out.dtype)
    return torch.addmm(out.flatten(0, -2), hidden.flatten(0, -2), lora_b.mT, alpha=scaling).view_as(out)


def add_low_rank_(out, x, lora_a, lora_b, scaling):
    """The same in place: `out` (rows, out), which nobody else holds, and `x` (rows, in)."""
    if not out.dtype == x.dtype == lora_a.dtype == lora_b.dtype:
        dtype = product_dtype(out, lora_a)
        x, lora_a, lora_b = x.to(dtype), lora_a.to(dtype), lora_b.to(dtype)
    hidden = F.linear(x, lora_a)  # (rows, r)
    if out.dtype == hidden.dtype == lora_b.dtype:
        out.addmm_(hidden, lora_b.mT, alpha=scaling)
    else:
        out.add_(F.linear(hidden, lora_b), alpha=scaling)


def apply_dora_scale(out, scale, bias):
    """c * (out - b) + b: the base's bias is left out of the decomposition. `scale` is c, broadcast over (..., out)."""
    scale = scale.to(out.dtype)
    return out * scale if bias is None else torch.addcmul(bias, out - bias, scale)


def apply_dora_scale_(out, scale, bias):
    """The same in place."""
    if bias is None:
        out.mul_(scale)
    else:
        out.sub_(bias).mul_(scale).add_(bias)


def may_write_to_output_of(layer):
    """Whether a result of `layer` may be overwritten: no gradient needs it, and no hook on the layer looks at it.

    The gradient of a plain linear needs its input and weight; what that of another kind needs is not ours to know.
    """
    return not _is_heard(layer) and (not torch.is_grad_enabled() or _is_plain(layer))


def is_only_its_product(layer):
    """Whether calling `layer` now is F.linear and nothing else: a plain linear at inference, and nobody listens.

    Where it is, a single row goes past the module's call, which costs as much as a small product.
    """
    return (
        _is_plain(layer) and not torch.is_grad_enabled() and not _is_heard(layer) and not torch.compiler.is_compiling()
    )


def _is_plain(layer):
    """Whether it computes what nn.Linear does: it is one, and its forward was not replaced (as to fetch weights)."""
    return type(layer) is nn.Linear and "forward" not in layer.__dict__


def _is_heard(layer):
    """Whether a hook sees what goes in or comes out."""
    return layer._forward_hooks or layer._forward_pre_hooks or any(_EVERYBODYS_HOOKS)


_EVERYBODYS_HOOKS = tuple(
    getattr(nn.modules.module, name, {}) for name in ("_global_forward_hooks", "_global_forward_pre_hooks")
)


def init_lora_a(shape, generator):
    """A fresh A: U(-1/sqrt(in), 1/sqrt(in)), which is PEFT's Kaiming-uniform with a = sqrt(5). fp32, on the CPU."""
    bound = shape[-1] ** -0.5
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


class LowRankUpdate(nn.Module):
    """The tensors of one LoRA or DoRA update, or of a stack of them with a leading expert axis.

    Attributes:
        lora_A: [..., r, in].
        lora_B: [..., out, r].
        magnitude: [..., out], fp32, or None for plain LoRA.
        scaling: s.
        weight_norms_squared: ||W||^2 of the base, [out], fp32; None for plain LoRA. Not saved: it follows from the
            base.
    """

    def __init__(self, lora_a, lora_b, magnitude, scaling, dropout, weight_norms_squared=None):
        super().__init__()
        self.lora_A = nn.Parameter(lora_a)
        self.lora_B = nn.Parameter(lora_b)
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude.float()))
        self.register_buffer("weight_norms_squared", weight_norms_squared, persistent=False)
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout)
        self._scale_cache = (None, None)
        self._experts_cache = (None, None, None)

    def scale(self, layer):
        """c = m / ||W + s B A||: [..., out], fp32. At inference it is kept until a weight changes."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._scale_cache = (None, None)
            return self.magnitude / self._norms(layer)
        key = self._weights_key()
        if key is None or key != self._scale_cache[0]:
            self._scale_cache = (key, self.magnitude / self._norms(layer))
        return self._scale_cache[1]

    def experts(self, dtype):
        """(A, B) of each expert of a stack in `dtype`: lists of [r, in] and [out, r]. At inference views are kept."""
        a, b = self._parameters["lora_A"], self._parameters["lora_B"]
        # With gradients unbind, not indexing: its backward is one stack, and an expert without tokens gets zeros.
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not a.dtype == b.dtype == dtype:
            return a.to(dtype).unbind(), b.to(dtype).unbind()
        key = (a.data_ptr(), b.data_ptr())
        if self._experts_cache[0] != key:
            self._experts_cache = (key, a.unbind(), b.unbind())
        return self._experts_cache[1:]

    def _norms(self, layer):
        return dora_norms(layer, self.weight_norms_squared, self.lora_A, self.lora_B, self.scaling)

    def _weights_key(self):
        """Changes whenever a weight is replaced or written to; None where torch does not count writes."""
        tensors = self._parameters  # past the look-up of a module's attributes: this runs for each layer and token
        a, b, m = tensors["lora_A"], tensors["lora_B"], self.magnitude
        try:
            return a.data_ptr(), b.data_ptr(), m.data_ptr(), a._version, b._version, m._version
        except RuntimeError:  # made in inference mode
            return None

    def _apply(self, fn, recurse=True):
        """Move and cast as usual, but keep what DoRA divides by in fp32: in bf16 the magnitude is off by 0.4%."""
        kept = {name: getattr(self, name) for name in ("magnitude", "weight_norms_squared")}
        exact = {name: tensor.detach() for name, tensor in kept.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = getattr(self, name)
            if moved.dtype != torch.float32:
                moved.data = tensor.to(moved.device)
        self._scale_cache = (None, None)
        self._experts_cache = (None, None, None)
        return self


class AdaptedLinear(nn.Module):
    """A base linear with a LoRA or DoRA update on it: (..., in) -> (..., out).

    Args:
        base_layer: any linear the base brings. It is called, never unpacked.
        update: its `LowRankUpdate`.
    """

    def __init__(self, base_layer, update):
        super().__init__()
        self.base_layer = base_layer
        self.update = update

    # Some models read these from their projections (flash attention looks at the weight's dtype).
    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self):
        return linear_shape(self.base_layer)[1]

    @property
    def out_features(self):
        return linear_shape(self.base_layer)[0]

    def forward(self, x, *args, **kwargs):
        layer, update = self.base_layer, self.update
        if x.numel() == x.shape[-1] and not (self.training or args or kwargs) and is_only_its_product(layer):
            return self._one_row(layer, update, x)
        if args or kwargs or not may_write_to_output_of(layer):
            out = layer(x, *args, **kwargs)
            x = update.dropout(x) if self.training else x
            out = add_low_rank(out, x, update.lora_A, update.lora_B, update.scaling)
            return out if update.magnitude is None else apply_dora_scale(out, update.scale(layer), self.bias)
        rows = x.reshape(-1, x.shape[-1])  # the product then is no view, which autograd would copy to write to it
        out = layer(rows)
        rows = update.dropout(rows) if self.training else rows
        add_low_rank_(out, rows, update.lora_A, update.lora_B, update.scaling)
        if update.magnitude is not None and torch.is_grad_enabled():  # the gradient of c needs what c multiplies
            out = apply_dora_scale(out, update.scale(layer), self.bias)
        elif update.magnitude is not None:
            apply_dora_scale_(out, update.scale(layer), self.bias)
        return out.view(*x.shape[:-1], out.shape[-1])

    def _one_row(self, layer, update, x):
        """Decoding, where starting kernels and looking up attributes take longer than the products: as few as can be.

        In float32 a row is a vector: products with it start in half the time of those with a matrix of one row.
        """
        tensors, bias = update._parameters, layer._parameters["bias"]
        lora_a, lora_b = tensors["lora_A"], tensors["lora_B"]
        out = F.linear(x, layer._parameters["weight"], bias)
        row = out.view(-1)
        if out.dtype == x.dtype == lora_a.dtype == lora_b.dtype == torch.float32:
            row.addmv_(lora_b, torch.mv(lora_a, x.reshape(-1)), alpha=update.scaling)
        else:
            add_low_rank_(row.unsqueeze(0), x.reshape(1, -1), lora_a, lora_b, update.scaling)
        if update.magnitude is not None:
            apply_dora_scale_(row, update.scale(layer), bias)
        return out

    @torch.no_grad()
    def merged_weight(self):
        """c * (W + s B A), [out, in], in the base weight's dtype.

        Raises:
            ValueError: the base weight is quantised or offloaded.
        """
        weight = plain_weight(self.base_layer)
        if weight is None:
            raise ValueError(
                f"cannot merge into a {type(self.base_layer).__name__} (quantised, offloaded or not a plain linear): "
                "load the base without quantization_config and device_map offload, then merge"
            )
        update = self.update
        merged = weight.float() + update.scaling * (update.lora_B.float() @ update.lora_A.float())
        if update.magnitude is not None:
            merged *= update.scale(self.base_layer)[:, None]
        return merged.to(weight.dtype)
