"""Convert a LoRA or DoRA that was read from PEFT's format: to PEFT's files, to our DoRA, or to modules in a base."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import WEIGHTS, from_peft
from minilora_hub.adapter_folder.reading import check_against_base
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import lora_settings, write_peft_config
from minilora_hub.formats.peft_reading import PeftAdapter, read_peft
from minilora_hub.formats.targets import layer_targets, shortest_names
from minilora_hub.remote_code.adapter_files import write_adapter
from minilora_hub.remote_code.base_structure import LinearSite, Site
from minilora_hub.remote_code.configuration_minilora import DoraConfig
from minilora_hub.remote_code.linear_layers import linear_shape

if TYPE_CHECKING:
    import torch


def write_normalised(folder: Path, adapter: PeftAdapter, source: Path | None) -> list[str]:
    """Write an adapter in PEFT's format as PEFT of this version writes it, as safetensors.

    Args:
        folder: an existing, empty folder.
        adapter: the adapter.
        source: the folder that it comes from; see `write_companions`.

    Returns:
        Notes for the user, one line each.
    """
    targets = shortest_names(adapter.updates, adapter.base.skeleton)
    fields = lora_settings(**adapter.config, target_modules=targets)
    base = adapter.base
    write_peft_config(folder, fields, base.hub_id or base.name, base.commit)
    write_adapter(folder / WEIGHTS, adapter.tensors())
    return write_companions(folder, source, base)


def as_dora(adapter: PeftAdapter) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a DoRA of PEFT's format as a DoraConfig and ``{canonical name: tensor}``; see `as_ours`."""
    return as_ours(adapter, DoraConfig)


def as_ours(adapter: PeftAdapter, config_class: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a LoRA or DoRA of PEFT's format as a configuration of ours and ``{canonical name: tensor}``.

    Args:
        adapter: the adapter.
        config_class: a subclass of AdapterConfig, e.g. DoraConfig.

    Raises:
        AdapterError: it adapts linears outside the decoder layers, or only some of the layers, which our format does
            not support.
    """
    layers_path = adapter.base.layers_path
    on_linears = replace(adapter, experts={}, expert_sites=()).tensors()
    try:
        tensors = {from_peft(name, layers_path): tensor for name, tensor in on_linears.items()}
    except ValueError as error:
        raise AdapterError(f"{error}: an update outside the decoder layers is not supported") from error
    ranks = {
        f"layers.{path.removeprefix(f'{layers_path}.')}": (update.lora_a.shape[-2], update.scaling)
        for path, update in (adapter.updates | adapter.experts).items()
    }
    settings = {name: adapter.config[name] for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
    settings["target_modules"] = layer_targets(tensors, adapter.base) if tensors else []
    settings["target_parameters"] = adapter.config.get("target_parameters")
    for path, update in adapter.experts.items():
        name = f"layers.{path.removeprefix(f'{layers_path}.')}"
        tensors |= {f"{name}.lora_A": update.lora_a, f"{name}.lora_B": update.lora_b}
    patterns = {name: adapter.config[name] for name in ("rank_pattern", "alpha_pattern")}
    try:
        config = config_class(**settings, **patterns)
        if all(config.rank_and_scaling(name, config.r, config.lora_alpha) == both for name, both in ranks.items()):
            check_against_base(config, tensors, adapter.base)
            return config, tensors
    except (AdapterError, ValueError):
        pass  # a pattern with the base's own paths: use one entry per linear, see below
    return config_class(**settings, **_explicit_patterns(adapter, ranks)), tensors


def _explicit_patterns(adapter: PeftAdapter, ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Return rank_pattern and alpha_pattern with one entry for each linear that differs from the common settings."""
    config, rank_pattern, alpha_pattern = adapter.config, {}, {}
    for name, (r, scaling) in ranks.items():
        alpha = scaling * (math.sqrt(r) if config["use_rslora"] else r)
        key = re.escape(name)
        if r != config["r"]:
            rank_pattern[key] = r
        if alpha != config["lora_alpha"]:
            alpha_pattern[key] = alpha
    return {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}


class PeftLoraConfig(DoraConfig):
    """Configuration of a LoRA or DoRA with explicit rank and scaling per linear instead of patterns."""

    def __init__(self, *, use_dora: bool = False, of_linears: dict[str, tuple[int, float]] | None = None, **kwargs):
        """`of_linears`: name of a linear -> (rank, scaling)."""
        self.of_linears = of_linears or {}
        super().__init__(use_dora=True, **kwargs)
        self.use_dora = use_dora

    def rank_and_scaling(self, path: str, r: int, alpha: float) -> tuple[int, float]:
        """Rank and scaling of the linear at `path`."""
        return self.of_linears[path]


def read_peft_lora(source: AdapterFolder, base: BaseSource) -> tuple[PeftLoraConfig, dict[str, Any], list[Site]]:
    """Read a LoRA or DoRA for `base`, which is not changed. It may adapt any linear, including the head, and experts.

    Returns:
        The configuration, {name of the linear and the leaf: tensor}, and the sites; names are the base's
        own paths.

    Raises:
        AdapterError: a setting is not supported, or a tensor is missing, surplus, misshapen or not finite; the
            message names it.
    """
    adapter = read_peft(source, base)
    sites: list[Site] = []
    of_linears = {}
    tensors: dict[str, Any] = {}
    for path, update in adapter.updates.items():
        shape: Any = linear_shape(base.skeleton.get_submodule(path))
        out_features, in_features = shape
        sites.append(LinearSite(path, path, out_features, in_features))
        of_linears[path] = (update.lora_a.shape[0], update.scaling)
        tensors |= {f"{path}.lora_A": update.lora_a, f"{path}.lora_B": update.lora_b}
        if update.magnitude is not None:
            tensors[f"{path}.magnitude"] = update.magnitude
    for path, update in adapter.experts.items():
        of_linears[path] = (update.lora_a.shape[1], update.scaling)
        tensors |= {f"{path}.lora_A": update.lora_a, f"{path}.lora_B": update.lora_b}
    sites += adapter.expert_sites
    settings = {name: adapter.config[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
    return PeftLoraConfig(**settings, of_linears=of_linears), tensors, sites
