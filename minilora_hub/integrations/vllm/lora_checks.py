"""Checks of a LoRA that vLLM has read, before it is copied into a slot.

vLLM compares the names in a LoRA's file with the model, but not its shapes: a matrix that is too large stops the copy
halfway, and one that is too small is filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.linear import QKVParallelLinear

from minilora_hub.errors import AdapterError


def check_lora(lora: Any, layers: Mapping[str, Any], packed: Mapping[str, Sequence[str]]) -> None:
    """Raise an AdapterError unless every A and B of a LoRA fits its linear and holds finite numbers.

    Args:
        lora: a LoRAModel, as vLLM has read it.
        layers: {vLLM's name: layer with LoRA}; weights for layers of other kinds than linears are left to vLLM.
        packed: {name of a layer that several linears were fused into: their names}.
    """
    places = {part: (name, index) for name, parts in packed.items() for index, part in enumerate(parts)}
    for name, weights in lora.loras.items():
        fused, index = places.get(name, (name, None))
        layer = layers.get(fused)
        if not isinstance(layer, BaseLinearLayerWithLoRA):
            continue
        sizes = _output_sizes(layer.base_layer)
        out = sum(sizes) if index is None or len(sizes) != len(packed[fused]) else sizes[index]
        rank = weights.rank
        _check(f"{name}.lora_A", weights.lora_a, (rank, layer.base_layer.input_size))
        _check(f"{name}.lora_B", weights.lora_b, (out, rank))


def _check(name: str, tensor: Any, shape: tuple[int, int]) -> None:
    if tensor is None:
        raise AdapterError(f"missing {name}")
    if tuple(tensor.shape) != shape:
        raise AdapterError(f"{name} has shape {tuple(tensor.shape)}; the base and the rank need {shape}")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} holds values that are not finite")


def _output_sizes(linear: Any) -> list[int]:
    """The output sizes of the linears that vLLM has fused into one, over all tensor-parallel ranks."""
    if isinstance(linear, QKVParallelLinear):  # its own list counts every copy of a key or value head
        keys = linear.total_num_kv_heads
        return [linear.total_num_heads * linear.head_size, keys * linear.head_size, keys * linear.v_head_size]
    return list(getattr(linear, "output_sizes", None) or [linear.output_size])
