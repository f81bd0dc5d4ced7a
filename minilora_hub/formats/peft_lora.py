"""A LoRA or DoRA of PEFT's format in the terms in which the published code puts adapters into a base."""

from __future__ import annotations

from typing import Any

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.formats.peft_reading import read_peft
from minilora_hub.remote_code.adapted_linear import linear_shape
from minilora_hub.remote_code.base_structure import LinearSite
from minilora_hub.remote_code.configuration_minilora import DoraConfig


class PeftLoraConfig(DoraConfig):
    """Rank and scaling of each linear as its own tensors have them, whatever PEFT's patterns said."""

    def __init__(self, *, use_dora: bool = False, of_linears: dict[str, tuple[int, float]] | None = None, **kwargs):
        """`of_linears`: name of a linear -> (rank, scaling)."""
        self.of_linears = of_linears or {}
        super().__init__(use_dora=True, **kwargs)
        self.use_dora = use_dora

    def rank_and_scaling(self, path: str, r: int, alpha: float) -> tuple[int, float]:
        """Rank and scaling of the linear at `path`."""
        return self.of_linears[path]


def read_peft_lora(source: AdapterFolder, base: BaseSource) -> tuple[PeftLoraConfig, dict[str, Any], list[LinearSite]]:
    """Read a LoRA or DoRA for `base`, which is only looked at. It may sit on any linear, the head included.

    Returns:
        The configuration, {name of the linear and the leaf: tensor}, and the linears it sits on; names are the base's
        own paths.

    Raises:
        AdapterError: a setting cannot be honoured, or a tensor is missing, surplus, misshapen or not finite; the
            message names it.
    """
    adapter = read_peft(source, base)
    sites, of_linears = [], {}
    tensors: dict[str, Any] = {}
    for path, update in adapter.updates.items():
        out_features, in_features = linear_shape(base.skeleton.get_submodule(path))
        sites.append(LinearSite(path, path, out_features, in_features))
        of_linears[path] = (update.lora_a.shape[0], update.scaling)
        tensors |= {f"{path}.lora_A": update.lora_a, f"{path}.lora_B": update.lora_b}
        if update.magnitude is not None:
            tensors[f"{path}.magnitude"] = update.magnitude
    settings = {name: adapter.config[name] for name in ("r", "lora_alpha", "use_rslora", "use_dora")}
    return PeftLoraConfig(**settings, of_linears=of_linears), tensors, sites
