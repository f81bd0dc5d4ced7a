"""Translate the tensor names of one adapter between a PEFT model and its file, and check the file.

PEFT only warns of missing tensors and drops surplus ones; here both are errors, before a value is copied.
"""

from __future__ import annotations

from typing import Any

import torch

from minilora_hub.adapter_folder.names import (
    MIXLORA_ATTRIBUTE,
    PEFT_PREFIX,
    as_stock_transformers_reads,
    canonical_of_peft_mixlora,
    lora_name_of_peft_mixlora,
)
from minilora_hub.remote_code.adapter_files import check_tensors


def saved_name(key: str, adapter_name: str, *, as_lora: bool) -> str:
    """Return the name in a file of a parameter in a model.

    Args:
        key: e.g. ``base_model.model.model.layers.0.mlp.moe_lora.default.router``.
        adapter_name: here ``default``.
        as_lora: whether the adapter is a PEFT LoRA, whose file has PEFT's LoRA names.
    """
    module, _, leaf = key.partition(f".{MIXLORA_ATTRIBUTE}.{adapter_name}.")
    # A linear inside a block that is wrapped, too.
    module = ".".join(part for part in module.split(".") if part != "base_layer")
    name = f"{module}.{MIXLORA_ATTRIBUTE}.{leaf}"
    return lora_name_of_peft_mixlora(name) if as_lora else name


def remap_for_load(
    model: Any, adapter_name: str, state_dict: dict[str, torch.Tensor], *, as_lora: bool
) -> dict[str, torch.Tensor]:
    """Return a file's tensors under the names of the model's parameters, whichever dialect the file is in.

    Args:
        model: the model, with the adapter's parameters in it.
        adapter_name: the adapter.
        state_dict: the tensors of the file, and those that PEFT has named already (`modules_to_save`, embeddings).
        as_lora: see `saved_name`.

    Raises:
        ValueError: a tensor of the adapter is missing, surplus, misshapen or not finite; the message names it.
    """
    current = model.state_dict()
    own = {key: value for key, value in current.items() if f".{MIXLORA_ATTRIBUTE}.{adapter_name}." in key}
    keys = {saved_name(key, adapter_name, as_lora=as_lora).removeprefix(PEFT_PREFIX): key for key in own}
    if not as_lora and any(name.startswith("layers.") for name in state_dict):
        keys = {canonical_of_peft_mixlora(name): key for name, key in keys.items()}
    if any(name.startswith("mixlora.layers.") for name in state_dict):
        raise ValueError(
            f"adapter {adapter_name!r}: its file has the reference's tensor names (mixlora.layers.…): convert it with "
            "minilora import"
        )
    found, others = {}, {}
    for name, tensor in state_dict.items():
        if name in current and name not in own:
            others[name] = tensor
        else:
            short = name.removeprefix(PEFT_PREFIX)
            found[as_stock_transformers_reads(short) if as_lora else short] = tensor
    check_tensors(f"adapter {adapter_name!r}: its file", found, {name: own[key].shape for name, key in keys.items()})
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"adapter {adapter_name!r}: {name} holds values that are not finite numbers")
    # Copied: PEFT may put the file's mapped memory into the model, whose alignment changes what is computed.
    return others | {keys[name]: tensor.clone() for name, tensor in found.items()}
