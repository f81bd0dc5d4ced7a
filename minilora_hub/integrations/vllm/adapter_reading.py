"""Read an adapter folder into the tensors that vLLM's LoRA layers take, and check all of it.

vLLM answers an error that is raised while an adapter is loaded and goes on; an error while the adapter is copied into a
slot stops the engine. So the adapter is read by the strict reader of `minilora export`, which checks settings, names,
shapes and values against the base's structure, before vLLM sees a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora_hub.adapter_folder.folders import AdapterFolder, only_ours, read_folder
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, join_peft
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.reading import read_adapter
from minilora_hub.remote_code.attach import build_modules, updates_at
from minilora_hub.remote_code.base_structure import LinearSite

PROJECTIONS = (("gate_proj", "up_proj"), "down_proj")
"""Inputs and output of the feed-forward blocks whose experts can be served at run time."""


@dataclass
class ReadAdapter:
    """An adapter, checked against its base.

    Attributes:
        rank: the largest rank of its updates on linears, at least 1.
        tensors: {name in PEFT's format: A or B} on linears; B is multiplied by the scaling.
        magnitudes: {path of the linear in the base: m, [out]}; empty for an adapter without DoRA.
        mixtures: {path of the feed-forward block: its router and experts}; empty unless it is a MixLoRA.
    """

    rank: int = 1
    tensors: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    mixtures: dict[str, Any] = field(default_factory=dict)


def find_own_adapter(path: str) -> AdapterFolder | None:
    """Return the adapter in a folder if the plugin must read it; None to leave it, or the error, to vLLM.

    Raises:
        AdapterError: it is a MixLoRA in a format that must be converted first, or it refers to code elsewhere.
    """
    folder = Path(path)
    if not any((folder / name).is_file() for name in (OUR_CONFIG, PEFT_CONFIG)):
        return None
    source = read_folder(folder)
    if (source.dialect, source.method) == ("peft", "lora") or source.dialect == "checkpoint":
        return None
    if source.dialect not in ("peft", "minilora"):
        raise AdapterError(
            f"adapter {folder.name!r} is a MixLoRA in the format {source.dialect!r}: convert it with `minilora import`"
        )
    return source


def read_own_adapter(source: AdapterFolder, base: BaseSource) -> ReadAdapter:
    """Read an adapter for the base that vLLM serves.

    Raises:
        AdapterError: a setting cannot be honoured, or a tensor is missing, surplus, misshapen or not finite; the
            message names it.
    """
    with plain_torch():
        config, tensors, sites = read_adapter(source, base)
    if config.use_dora and config.model_type == "mixlora":
        raise AdapterError(
            f"adapter {source.folder.name!r}: use_dora=True in a MixLoRA cannot be served beside other adapters: serve "
            f"it as a model of its own, `vllm serve {source.folder.name}`"
        )
    if field := only_ours(vars(config)):
        raise AdapterError(f"adapter {source.folder.name!r}: {field} cannot be served by vLLM: use `minilora serve`")
    if config.target_parameters:
        raise AdapterError(
            f"adapter {source.folder.name!r}: target_parameters={config.target_parameters}: an adapter on a base's "
            "stacked experts cannot be served at run time; `minilora export --to dense` merges it into its base"
        )
    found = ReadAdapter()
    for site in sites:
        if not isinstance(site, LinearSite):
            continue
        for update in updates_at(site, config):
            a, b = tensors[f"{update.name}.lora_A"], tensors[f"{update.name}.lora_B"]
            found.rank = max(found.rank, update.r)
            found.tensors[join_peft(site.path, "lora_A")] = a.float()
            found.tensors[join_peft(site.path, "lora_B")] = b.float() * update.scaling
            if config.use_dora:
                found.magnitudes[site.path] = tensors[f"{update.name}.magnitude"].float()
    mixtures = [site for site in sites if not isinstance(site, LinearSite)]
    for site in mixtures:
        if (tuple(site.structure.inputs), site.structure.output) != PROJECTIONS:
            raise AdapterError(
                f"{site.path}: experts on {site.structure.inputs} and {site.structure.output} cannot be served at run "
                f"time; they must be {PROJECTIONS}"
            )
    if mixtures:
        with plain_torch():
            found.mixtures = build_modules(base.skeleton, config, mixtures, tensors)
    for mixture in found.mixtures.values():
        # vLLM's layers are called instead of the block's; the mixture only looks for a bias here.
        mixture.base_block = nn.ModuleDict({name: nn.Identity() for name in (*PROJECTIONS[0], PROJECTIONS[1])})
        mixture.eval().requires_grad_(False)
    return found


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute on the CPU, in float32 and outside of inference mode, whatever vLLM has set while it loads a model."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False):
            yield
    finally:
        torch.set_default_dtype(dtype)
