"""What an adapter folder holds: told from its configuration alone, and read in full for a base."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from minilora_hub.errors import AdapterError
from minilora_hub.formats.code_references import require_no_other_code

Kind = Literal["base", "LoRA", "DoRA", "MixLoRA", "MixDoRA"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFacts:
    """What the configuration and the weights' header tell.

    Attributes:
        kind: the method.
        detail: one short line, e.g. ``"r 16, 8 experts, 2 active"``.
        parameters: values in the weights file, which is what the adapter adds to the base.
        experts: of each mixture; 0 where there is none.
    """

    kind: Kind
    detail: str
    parameters: int
    experts: int = 0


def adapter_type(folder: Path) -> str:
    """Tell what an adapter folder holds, without loading it.

    Returns:
        ``"mixlora"`` or ``"dora"`` (our format), or ``"peft"`` (LoRA or DoRA in PEFT's).

    Raises:
        AdapterError: the folder is missing or holds no adapter of a known kind.
    """
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    if not (folder / "adapter_config.json").is_file():
        found = read_json(folder / "config.json").get("model_type")
        if found not in ("mixlora", "dora"):
            raise AdapterError(
                f"adapter {str(folder)!r}: model_type={found!r} in config.json, must be 'mixlora' or 'dora'"
            )
    else:
        method, found = read_json(folder / "adapter_config.json").get("peft_type"), "peft"
        if method != "LORA":
            raise AdapterError(f"adapter {str(folder)!r}: peft_type={method!r} in adapter_config.json, must be 'LORA'")
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"adapter {str(folder)!r}: no {WEIGHTS}")
    return found


def adapter_facts(folder: Path) -> AdapterFacts:
    """Read an adapter's kind and size; no tensor is read, and nothing of the folder is run.

    Raises:
        AdapterError: the folder is missing, damaged, holds no adapter of a known kind, or leads to code elsewhere.
    """
    found = adapter_type(folder)
    require_no_other_code(folder)
    settings = read_json(folder / ("adapter_config.json" if found == "peft" else "config.json"))
    detail = f"r {settings.get('r')}"
    kind: Kind = "DoRA" if found == "dora" or settings.get("use_dora") else "LoRA"
    experts = 0
    if found == "mixlora":
        kind = "MixDoRA" if settings.get("use_dora") else "MixLoRA"
        experts = int(settings.get("num_experts") or 0)
        top_p = settings.get("routing_strategy") == "top_p"
        active = f"top-p {settings.get('router_top_p')}" if top_p else f"{settings.get('num_experts_per_tok')} active"
        detail += f", {settings.get('num_experts')} experts, {active}"
    return AdapterFacts(kind, detail, _values_in(folder / WEIGHTS), experts)


def read_adapter_folder(folder: Path, base: nn.Module) -> tuple[Any, list[Any], dict[str, Any]]:
    """Read an adapter for `base`, strictly; the base is only looked at.

    Returns:
        Its configuration, the places it takes in the base, and {canonical name: tensor}.

    Raises:
        AdapterError: the folder is missing, holds no adapter of a known kind, or leads to code elsewhere.
        ValueError: it is damaged or does not fit the base; the message names the tensor or the field.
    """
    found = adapter_type(folder)
    require_no_other_code(folder)
    if found == "peft":
        from minilora_hub.formats.peft_lora import read_peft_lora

        return read_peft_lora(folder, base)

    from minilora_hub.remote_code.adapter_files import read_adapter
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import plan_sites
    from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig

    config = (MixLoraConfig if found == "mixlora" else DoraConfig).from_pretrained(str(folder))
    sites = plan_sites(base, config)
    return config, sites, read_adapter(folder / WEIGHTS, expected_tensors(config, sites))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of an adapter folder.

    Raises:
        AdapterError: the file is missing, cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"adapter {str(path.parent)!r}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{str(path)!r}: must hold a JSON object")
    return content


def _values_in(path: Path) -> int:
    """Count the values in a safetensors file from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable safetensors file ({error})") from error
