"""Convert a MixLoRA from and to the layout of the PEFT method (`MixLoraPeftConfig`): the same tensors, renamed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import (
    CANONICAL_LAYERS,
    PEFT_PREFIX,
    STRATEGIES,
    WEIGHTS,
    canonical_of_peft_mixlora,
    to_peft_mixlora,
)
from minilora_hub.adapter_folder.reading import read_tensors
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.mixlora import expert_rank_and_alpha
from minilora_hub.formats.targets import layer_targets, peft_target_names
from minilora_hub.integrations.peft.config import FIELD_NAMES, SAME_FIELDS
from minilora_hub.remote_code.adapter_files import write_adapter


def write_peft_mixlora(
    folder: Path, config: Any, tensors: dict[str, torch.Tensor], sites: list[Any], base: BaseSource
) -> list[str]:
    """Write a MixLoRA that `PeftModel.from_pretrained(base, folder)` reads after `minilora_hub.register()`.

    Args:
        folder: an existing folder.
        config: its MixLoraConfig.
        tensors: ``{canonical name: tensor}``.
        sites: the adapted modules of the base.
        base: its base.

    Returns:
        Notes for the user, one line each.
    """
    from minilora_hub.integrations.peft.method import MixLoraPeftConfig  # registers MIXLORA in PEFT

    if config.routing_strategy not in STRATEGIES.values():
        raise AdapterError(
            f"routing_strategy={config.routing_strategy!r}: MIXLORA in PEFT has {', '.join(STRATEGIES.values())} only"
        )
    fields = {name: getattr(config, name) for name in SAME_FIELDS}
    fields |= {theirs: getattr(config, ours, None) for theirs, ours in FIELD_NAMES.items()}
    for pattern in ("rank_pattern", "alpha_pattern"):
        fields[pattern] = _moved(fields[pattern], CANONICAL_LAYERS, base.layers_path)
    expert_r, expert_alpha = expert_rank_and_alpha(config)
    MixLoraPeftConfig(
        **fields,
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.base_model_revision,
        expert_lora={"r": expert_r, "lora_alpha": expert_alpha, "lora_dropout": config.lora_dropout},
        routing_strategy=config.routing_strategy,
        router_aux_loss_coef=config.router_aux_loss_coef,
        target_modules=peft_target_names(sites, base.skeleton),
    ).save_pretrained(str(folder))
    renamed = {to_peft_mixlora(name, base.layers_path): tensor for name, tensor in tensors.items()}
    write_adapter(folder / WEIGHTS, renamed)
    return ["PEFT reads it where minilora_hub is installed and minilora_hub.register() was called; stock PEFT does not"]


def read_peft_mixlora(source: AdapterFolder, base: BaseSource) -> tuple[Any, dict[str, torch.Tensor]]:
    """Read a MixLoRA in this layout: the inverse of `write_peft_mixlora`.

    Returns:
        A MixLoraConfig and ``{canonical name: tensor}``; `write_ours` checks them against the base.

    Raises:
        AdapterError: the settings or the tensors cannot be read, or our format does not support one of them.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # PEFT only warns about unknown settings
            config = _our_config(source)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"adapter {source.name!r} cannot be read as a MixLoRA in PEFT's format: {reason}") from error
    start = f"{PEFT_PREFIX}{base.layers_path}."
    tensors = {}
    for name, tensor in read_tensors(source.folder).items():
        if not name.startswith(start):
            raise AdapterError(f"{name}: not a tensor under {start!r}, where the base has its layers")
        try:
            tensors[canonical_of_peft_mixlora(name)] = tensor
        except ValueError as error:
            raise AdapterError(str(error)) from error
    config.target_modules = layer_targets(tensors, base)
    for pattern in ("rank_pattern", "alpha_pattern"):
        setattr(config, pattern, _moved(getattr(config, pattern), base.layers_path, CANONICAL_LAYERS))
    config.dtype = base.config.dtype
    return config, tensors


def _our_config(source: AdapterFolder) -> Any:
    from minilora_hub.integrations.peft.method import MixLoraPeftConfig

    theirs = MixLoraPeftConfig.from_pretrained(str(source.folder))
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(theirs, name):
            raise AdapterError(f"{name}={getattr(theirs, name)!r}: our format holds the tensors of a MixLoRA only")
    dropout = (theirs.expert_lora or {}).get("lora_dropout")
    if dropout != theirs.lora_dropout:
        raise AdapterError(
            f"expert_lora: lora_dropout={dropout}: must be that of the adapter, {theirs.lora_dropout}: our format has "
            "one for both"
        )
    config = theirs.model_config()
    if (config.expert_r, config.expert_alpha) == (config.r, config.lora_alpha):
        config.expert_r = config.expert_alpha = None  # as written by hand, and as older code reads it
    return config


def _moved(pattern: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    """Replace the path of the list of layers at the start of a pattern's keys."""
    return {new + key.removeprefix(old) if key.startswith(f"{old}.") else key: v for key, v in pattern.items()}
