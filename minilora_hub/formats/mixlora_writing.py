"""Write a MixLoRA in the reference format; see `minilora_hub.formats.mixlora`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minilora_hub.adapter_folder.folders import write_json
from minilora_hub.adapter_folder.names import PEFT_CONFIG, PICKLE, STRATEGIES, to_reference
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.mixlora import activation_of, expert_rank_and_alpha
from minilora_hub.formats.settings import NO_DROPOUT

WRITTEN = {ours: theirs for theirs, ours in STRATEGIES.items()}
FAMILIES = ("llama", "gemma", "gemma2", "qwen2", "mistral", "phi", "phi3")
"""The bases that the reference runs on."""


def write_reference(folder: Path, config: Any, tensors: dict[str, torch.Tensor], base: BaseSource) -> list[str]:
    """Write a MixLoRA in the reference format.

    Args:
        folder: an existing, empty folder.
        config: its MixLoraConfig.
        tensors: ``{canonical name: tensor}``.
        base: its base.

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: the reference format cannot represent a field or tensor; the message names it.
    """
    fields, notes = _reference_fields(config, tensors, base)
    renamed = {}
    for name, tensor in tensors.items():
        try:
            if ".experts." in name:
                for expert, value in enumerate(tensor):
                    renamed[to_reference(name, expert)] = value.clone()
            else:
                renamed[to_reference(name)] = tensor
        except ValueError as error:
            raise AdapterError(str(error)) from error
    write_json(folder / PEFT_CONFIG, fields)
    torch.save(renamed, folder / PICKLE)
    return notes


def _reference_fields(
    config: Any, tensors: dict[str, torch.Tensor], base: BaseSource
) -> tuple[dict[str, Any], list[str]]:
    """Return the reference's adapter_config.json; raise AdapterError if it cannot represent a setting."""
    notes = []
    family = base.config.model_type
    if family not in FAMILIES:
        raise AdapterError(f"base of type {family!r}: the reference runs on {', '.join(FAMILIES)}")
    if config.use_dora:
        raise AdapterError("use_dora=True: the reference format does not store magnitudes, and would compute LoRA")
    for name in ("rank_pattern", "alpha_pattern"):
        if getattr(config, name):
            raise AdapterError(f"{name}={getattr(config, name)}: the reference has one rank and alpha for all")
    if config.routing_strategy not in WRITTEN:
        raise AdapterError(f"routing_strategy={config.routing_strategy!r}: the reference has {', '.join(WRITTEN)} only")
    alpha = config.lora_alpha
    expert_r, expert_alpha = expert_rank_and_alpha(config)
    for name, value in (("lora_alpha", alpha), ("expert_alpha", expert_alpha)):
        if int(value) != value:
            raise AdapterError(f"{name}={value}: the reference takes whole numbers")
    fields: dict[str, Any] = {
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.hub_id or base.name,
        "r": config.r,
        "lora_alpha": int(alpha),
        "lora_dropout": float(config.lora_dropout or NO_DROPOUT),
        "target_modules": sorted({name.split(".")[-2] for name in tensors if name.endswith(".lora_A")}),
        "num_experts": config.num_experts,
        "routing_strategy": WRITTEN[config.routing_strategy],
        "act_fn": activation_of(base),  # without it the package fails
        "router_aux_loss_coef": float(config.router_aux_loss_coef),
        "router_init_range": float(config.router_init_range),
        "jitter_noise": float(config.router_jitter_noise),
    }
    if config.use_rslora:
        fields["use_rslora"] = True
    if (config.router_sparse_step or 1) > 1:
        raise AdapterError(
            f"router_sparse_step={config.router_sparse_step}: the reference ignores sparse_step, so every layer "
            "would be a mixture"
        )
    if config.expert_dropout and config.routing_strategy != "switch":
        notes.append("expert_dropout: the reference has it only for mixlora-switch; it only affects training")
    if (expert_r, expert_alpha) != (config.r, alpha):
        dropout = fields["lora_dropout"]
        fields["expert_lora"] = {"r": expert_r, "lora_alpha": int(expert_alpha), "lora_dropout": dropout}
        notes.append("expert_lora: MoE-PEFT uses the experts' own rank and alpha, mixlora 0.2.3 ignores them")
    if config.routing_strategy == "top_k":
        fields["top_k"] = config.num_experts_per_tok
    elif config.routing_strategy == "top_p":
        fields |= {"top_p": float(config.router_top_p), "temperature": float(config.router_temperature)}
    else:
        fields |= {
            "expert_capacity": config.expert_capacity,
            "router_z_loss_coef": float(config.router_z_loss_coef),
            "ffn_dropout": float(config.expert_dropout),
        }
    if config.routing_strategy != "top_k":
        notes.append(f"routing_strategy {fields['routing_strategy']}: supported by MoE-PEFT, not by mixlora 0.2.3")
    return fields, notes
