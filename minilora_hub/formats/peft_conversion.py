"""What becomes of an adapter that was read from PEFT's format: written anew in it, or a DoRA of ours."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.names import WEIGHTS, from_peft
from minilora_hub.adapter_folder.reading import check_against_base
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import lora_settings, target_names, write_peft_config
from minilora_hub.formats.peft_reading import PeftAdapter

if TYPE_CHECKING:
    import torch


def write_normalised(folder: Path, adapter: PeftAdapter, source: Path | None) -> list[str]:
    """Write an adapter in PEFT's format as PEFT of this version writes it, as safetensors.

    Args:
        folder: an existing, empty folder.
        adapter: the adapter.
        source: the folder that it comes from; see `write_companions`.

    Returns:
        What the user should know, a line each.
    """
    from minilora_hub.remote_code.adapter_files import write_adapter

    targets = target_names(sorted(adapter.updates), adapter.base.skeleton)
    fields = lora_settings(**adapter.config, target_modules=targets)
    base = adapter.base
    write_peft_config(folder, fields, base.hub_id or base.name, base.commit)
    write_adapter(folder / WEIGHTS, adapter.tensors())
    return write_companions(folder, source, base)


def as_dora(adapter: PeftAdapter) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a DoRA of PEFT's format as a DoraConfig and ``{canonical name: tensor}``.

    Raises:
        AdapterError: it sits where our format has no place: outside the decoder layers, or in some of them only.
    """
    from minilora_hub.remote_code.configuration_minilora import DoraConfig

    layers_path = adapter.base.layers_path
    try:
        tensors = {from_peft(name, layers_path): tensor for name, tensor in adapter.tensors().items()}
    except ValueError as error:
        raise AdapterError(f"{error}: a DoRA outside the decoder layers cannot be honoured") from error
    in_layers: dict[str, set[str]] = {}
    ranks: dict[str, tuple[int, float]] = {}
    for path, update in adapter.updates.items():
        index, _, inner = path.removeprefix(f"{layers_path}.").partition(".")
        in_layers.setdefault(inner, set()).add(index)
        ranks[f"layers.{index}.{inner}"] = (update.lora_a.shape[0], update.scaling)
    count = adapter.base.config.get_text_config(decoder=True).num_hidden_layers
    for inner, layers in in_layers.items():
        if len(layers) != count:
            raise AdapterError(
                f"{inner} is adapted in {len(layers)} of {count} layers (layers_to_transform or a pattern): "
                "a DoRA of ours has the same targets in every layer"
            )
    settings = {name: adapter.config[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    settings["target_modules"] = _short_targets(sorted(in_layers), adapter.base)
    patterns = {name: adapter.config[name] for name in ("rank_pattern", "alpha_pattern")}
    try:
        config = DoraConfig(**settings, **patterns)
        same = all(config.rank_and_scaling(name, config.r, config.lora_alpha) == both for name, both in ranks.items())
        if same:
            check_against_base(config, tensors, adapter.base)
            return config, tensors
    except (AdapterError, ValueError):
        pass  # a pattern that speaks of the base's own paths: written out below
    config = DoraConfig(**settings, **_explicit_patterns(adapter, ranks))
    return config, tensors


def _explicit_patterns(adapter: PeftAdapter, ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """rank_pattern and alpha_pattern with one entry a linear, for those that differ from the common settings."""
    config, rank_pattern, alpha_pattern = adapter.config, {}, {}
    for name, (r, scaling) in ranks.items():
        alpha = scaling * (math.sqrt(r) if config["use_rslora"] else r)
        key = re.escape(name)
        if r != config["r"]:
            rank_pattern[key] = r
        if alpha != config["lora_alpha"]:
            alpha_pattern[key] = alpha
    return {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


def _short_targets(paths: list[str], base: BaseSource) -> list[str] | str:
    """Targets of our format: last names where they are unambiguous, else whole paths in the layer."""
    from minilora_hub.remote_code.base_structure import find_decoder_layers, linears_in, matches_target

    available = set(linears_in(find_decoder_layers(base.skeleton)[1][0]))
    if available == set(paths):
        return "all-linear"
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    matched = {path for path in available if matches_target(path, leaves)}
    return leaves if matched == set(paths) else paths
