"""Tiny bases and adapters with random weights, in sizes that vLLM's CPU kernels accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import fill_adapter, tiny_base, tiny_config

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
HEAD_SIZES = {"qwen3": 32}  # the others' is hidden_size / num_attention_heads


def save_tiny(folder: Path, family: str, *methods: str, **changes: Any) -> dict[str, Any]:
    """Save a base in `folder`/base and adapters on it, each in `folder`/method; return {method: adapted model}."""
    sizes = SIZES | ({"head_dim": HEAD_SIZES[family]} if family in HEAD_SIZES else {})
    tiny_base(family, **sizes).save_pretrained(folder / "base")
    models = {}
    for method in methods:
        kind = DoraForCausalLM if method == "dora" else MixLoraForCausalLM
        models[method] = kind.from_base(str(folder / "base"), tiny_config(method, **changes))
        fill_adapter(models[method])
        models[method].save_pretrained(folder / method)
    return models
