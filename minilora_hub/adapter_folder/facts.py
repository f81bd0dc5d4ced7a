"""What an adapter folder holds, as far as its configuration and the header of its weights say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from minilora_hub.adapter_folder.folders import refuse_lfs_pointer
from minilora_hub.adapter_folder.sources import WEIGHTS, read_source
from minilora_hub.errors import AdapterError

Kind = Literal["base", "LoRA", "DoRA", "MixLoRA", "MixDoRA"]
KINDS: tuple[Kind, ...] = get_args(Kind)


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


def adapter_facts(folder: Path) -> AdapterFacts:
    """Read an adapter's kind and size; no tensor is read, and nothing of the folder is run.

    Raises:
        AdapterError: the folder is missing, damaged, holds no adapter of a known kind, or leads to code elsewhere.
    """
    source = read_source(folder)
    settings = source.config
    detail = f"r {settings.get('r')}"
    kind: Kind = "DoRA" if source.method == "dora" else "LoRA"
    experts = 0
    if source.method == "mixlora":
        kind = "MixDoRA" if settings.get("use_dora") else "MixLoRA"
        experts = int(settings.get("num_experts") or 0)
        top_p = settings.get("routing_strategy") == "top_p"
        active = f"top-p {settings.get('router_top_p')}" if top_p else f"{settings.get('num_experts_per_tok')} active"
        detail += f", {settings.get('num_experts')} experts, {active}"
    return AdapterFacts(kind, detail, _values_in(folder / WEIGHTS), experts)


def _values_in(path: Path) -> int:
    """Count the values in a safetensors file from its header."""
    from safetensors import SafetensorError, safe_open

    try:
        refuse_lfs_pointer(path)
        with safe_open(path, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{str(path)!r} is not a readable safetensors file ({error})") from error
