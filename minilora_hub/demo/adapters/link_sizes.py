"""How large an adapter's weights can be, from its configuration and the base's linears, before they are fetched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.base_structure import matches_target

WIDEST = 8
"""Bytes of a float64."""
HEADER, ENTRY = 2**20, 512
"""Bytes of a safetensors header: of its metadata, and of the entry of one tensor."""


def most_bytes(config: Mapping[str, Any], linears: Mapping[str, tuple[int, int]]) -> int:
    """Return the most bytes that the weights of an adapter can have on a base.

    It is a bound, as if every linear had each expert of its own, a magnitude and a router.

    Args:
        config: what config.json or adapter_config.json holds.
        linears: {path: (out_features, in_features)} of the base.

    Raises:
        AdapterError: a rank or the number of experts is no whole number above 0, or the base has none of the targets.
    """
    ranks = [("r", config.get("r", 16)), ("expert_r", config.get("expert_r") or 1)]
    ranks += [("rank_pattern", rank) for rank in (config.get("rank_pattern") or {}).values()]
    experts = config.get("num_experts", 8) if config.get("model_type") == "mixlora" else 1
    for name, value in (*ranks, ("num_experts", experts)):
        if type(value) is not int or value < 1:
            raise AdapterError(f"{name}={str(value)[:40]!r}: must be a whole number above 0")
    targets = config.get("target_modules", "all-linear")
    if targets != "all-linear" and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
        raise AdapterError(f"target_modules={str(targets)[:80]!r}: must be 'all-linear' or a list of names")
    adapted = [shape for path, shape in linears.items() if matches_target(path, targets)]
    if not adapted:
        raise AdapterError(f"target_modules={str(targets)[:80]}: the base of this page has no such linear")
    rank = max(value for _, value in ranks)
    values = sum(experts * (rank * (outputs + inputs) + outputs + inputs) for outputs, inputs in adapted)
    return WIDEST * values + HEADER + 4 * ENTRY * len(adapted)
