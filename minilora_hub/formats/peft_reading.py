"""Read LoRA, rsLoRA and DoRA adapters in PEFT's format strictly: unsupported settings are errors that name them.

PEFT ignores unknown settings, and initialises missing tensors anew. Both change the adapter's output, so here both are
errors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from minilora_hub.adapter_folder.folders import AdapterFolder, naming
from minilora_hub.adapter_folder.names import PEFT_CONFIG, PEFT_PREFIX, join_peft, split_peft
from minilora_hub.adapter_folder.reading import read_tensors
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft_experts import pack, peft_modules, sites_of, unpack
from minilora_hub.formats.settings import read_lora_settings
from minilora_hub.remote_code.base_structure import ExpertsSite
from minilora_hub.remote_code.linear_layers import linear_shape

WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""Parts of tensor names that show that a model was saved inside a wrapper, and the wrapper's name."""


@dataclass(frozen=True)
class Update:
    """One low-rank update: y = W x + s B A x.

    Attributes:
        lora_a: A, [r, in]; of stacked experts [experts, r, in].
        lora_b: B, [out, r]; of stacked experts [experts, out, r].
        scaling: s.
        magnitude: DoRA's m, [out]; None for LoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's format, checked against its base.

    Attributes:
        config: arguments for PEFT's LoraConfig, without defaults and bookkeeping fields.
        updates: {path of the linear in the base: update}.
        base: the base.
        experts: {path of a parameter of stacked experts: update}.
        expert_sites: the modules that hold those parameters.
    """

    config: dict[str, Any]
    updates: dict[str, Update]
    base: BaseSource
    experts: dict[str, Update] = field(default_factory=dict)
    expert_sites: tuple[ExpertsSite, ...] = ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors under PEFT's names."""
        found = {}
        for path, update in self.updates.items():
            found[join_peft(path, "lora_A")] = update.lora_a
            found[join_peft(path, "lora_B")] = update.lora_b
            if update.magnitude is not None:
                found[join_peft(path, "magnitude")] = update.magnitude
        stacked = {f"{path}.lora_A": update.lora_a for path, update in self.experts.items()}
        stacked |= {f"{path}.lora_B": update.lora_b for path, update in self.experts.items()}
        for site in self.expert_sites:
            found |= pack(site, self.base.skeleton.get_submodule(site.path), stacked)
        return found


def read_peft(source: AdapterFolder, base: BaseSource) -> PeftAdapter:
    """Read a LoRA or DoRA in PEFT's format.

    Raises:
        AdapterError: a setting is not supported, or a tensor is missing, surplus or misshapen.
    """
    with naming(source.name, base.name):
        return _read_peft(source, base)


def _read_peft(source: AdapterFolder, base: BaseSource) -> PeftAdapter:
    config = read_lora_settings(source)
    modules = dict(base.skeleton.named_modules())
    tensors_of_file = read_tensors(source.folder)
    _drop_base_copies(tensors_of_file, base)
    parts = split_tensors(tensors_of_file, config["use_dora"])
    sites = sites_of(base.skeleton, config.get("target_parameters", ()))
    experts = {path: update for site in sites for path, update in _take_experts(site, parts, config, base)}
    for path in sorted(parts):
        if path not in modules or linear_shape(modules[path]) is None:
            raise AdapterError(f"{path}: {_why_no_linear(path, base)}")
    _check_targets(source, base.skeleton, set(parts))
    if parts:
        _check_layout(config["fan_in_fan_out"], {path: modules[path] for path in sorted(parts)})
    updates = {}
    for path, tensors in sorted(parts.items()):
        shape: Any = linear_shape(modules[path])
        r, scaling = _rank_and_scaling(config, path)
        expected = {"lora_A": (r, shape[1]), "lora_B": (shape[0], r), "magnitude": (shape[0],)}
        _check_shapes(path, tensors, expected, r, base)
        updates[path] = Update(tensors["lora_A"], tensors["lora_B"], scaling, tensors.get("magnitude"))
    return PeftAdapter(config, updates, base, experts, tuple(sites))


def _take_experts(
    site: ExpertsSite, parts: dict[str, Any], config: dict[str, Any], base: BaseSource
) -> Iterator[tuple[str, Update]]:
    """Take the tensors of stacked experts out of `parts`; yield (path of a parameter, update)."""
    shapes = {name: (out_features, in_features) for name, out_features, in_features in site.targets}
    for name, module in peft_modules(site, base.skeleton.get_submodule(site.path)):
        path = f"{site.path}.{name}"
        if module not in parts:
            raise AdapterError(f"{path}: target_parameters names it, but there are no tensors for it ({module})")
        tensors = parts.pop(module)
        r, scaling = _rank_and_scaling(config, path)
        width = site.num_experts * r
        expected = {"lora_A": (width, shapes[name][1]), "lora_B": (shapes[name][0], width)}
        _check_shapes(module, tensors, expected, r, base)
        yield path, Update(*unpack(tensors["lora_A"], tensors["lora_B"], site.num_experts), scaling)


def _check_shapes(path: str, tensors: dict[str, Any], expected: dict[str, Any], r: int, base: BaseSource) -> None:
    for leaf, tensor in tensors.items():
        if tuple(tensor.shape) != expected[leaf]:
            raise AdapterError(
                f"{path}.{leaf} has shape {tuple(tensor.shape)}, rank {r} on the base {base.name!r} needs "
                f"{expected[leaf]}"
            )


def split_tensors(tensors: dict[str, torch.Tensor], use_dora: bool) -> dict[str, dict[str, torch.Tensor]]:
    """Group the tensors of a file by the linear that they belong to.

    Returns:
        ``{path of the linear: {"lora_A", "lora_B" and for DoRA "magnitude": tensor}}``, each of them complete.

    Raises:
        AdapterError: a name is not that of a LoRA or DoRA tensor, or an update is incomplete.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        for part, wrapper in WRAPPERS.items():
            if part in name:
                raise AdapterError(
                    f"{name}: {part!r} in a tensor's name comes from saving the model inside {wrapper}'s wrapper: "
                    "save the wrapped model instead"
                )
        if ".lora_embedding_" in name:
            raise AdapterError(f"{name}: updates of token embeddings are not supported, only those of linears")
        try:
            path, leaf = split_peft(name)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        if leaf in parts.setdefault(path, {}):
            raise AdapterError(f"{name}: this tensor is in the file twice, under two spellings of its name")
        parts[path][leaf] = tensor
    needed = {"lora_A", "lora_B"} | ({"magnitude"} if use_dora else set())
    for path, found in parts.items():
        if found.keys() != needed:
            what = "is missing" if needed - found.keys() else f"does not belong to use_dora={use_dora}"
            raise AdapterError(f"{path}: {sorted(needed ^ found.keys())[0]} {what}")
    return parts


def _rank_and_scaling(config: dict[str, Any], path: str) -> tuple[int, float]:
    """Return rank and scaling of a linear, with patterns interpreted as in PEFT."""
    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    r = ranks.get(get_pattern_key(ranks, path), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
    return r, alpha / (math.sqrt(r) if config["use_rslora"] else r)


def _check_layout(fan_in_fan_out: bool, adapted: dict[str, Any]) -> None:
    """Raise AdapterError if `fan_in_fan_out` fits none of the linears; it may be set for a mix of both kinds."""
    kinds = {path: type(module).__name__ for path, module in adapted.items()}
    if not any((kind == "Conv1D") == fan_in_fan_out for kind in kinds.values()):
        path, kind = next(iter(kinds.items()))
        raise AdapterError(
            f"{PEFT_CONFIG}: fan_in_fan_out={fan_in_fan_out}: the base's {path} is a {kind}; it is True for Conv1D "
            "and False for Linear"
        )


def _drop_base_copies(tensors: dict[str, torch.Tensor], base: BaseSource) -> None:
    """Drop the base's embeddings, which PEFT saves beside an update of them, after comparing them with the base's own.

    Raises:
        AdapterError: they differ, so the adapter belongs to other embeddings than the base has.
    """
    model = base.skeleton
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    for path in [path for path, module in model.named_modules() if any(module is one for one in embeddings)]:
        for name in (f"{PEFT_PREFIX}{path}.weight", f"{PEFT_PREFIX}{path}.base_layer.weight"):
            if name in tensors and not _same_values(tensors.pop(name), base.weight(path)):
                raise AdapterError(
                    f"{name}: differs from {path} of the base {base.name!r}: resized or trained embeddings are not "
                    "supported"
                )


def _same_values(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two tensors are equal apart from their dtype."""
    if copy.shape != own.shape:
        return False
    own = own.detach().cpu()
    return torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)


def _why_no_linear(path: str, base: BaseSource) -> str:
    """Return why a tensor's path is not that of a linear of the base."""
    kind = f"the base {base.name!r} ({base.config.model_type})"
    found = re.fullmatch(r"(?:(.+?)\.)?(\d+)\.(.+)", path)
    layers_path = base.layers_path
    if found and (found[1] or "") != layers_path and f"{layers_path}.{found[2]}.{found[3]}" in _linears(base.skeleton):
        return (
            f"the adapter's tensors are under {found[1] or 'no prefix'!r}, and {kind} has its layers under "
            f"{layers_path!r}: it was trained on another class of this model; pass base= (--base) of that class"
        )
    return f"{kind} has no such linear"


def _linears(model: Any) -> set[str]:
    return {path for path, module in model.named_modules() if linear_shape(module)}


def _check_targets(source: AdapterFolder, model: Any, adapted: set[str]) -> None:
    """Raise AdapterError unless the linears that the settings name are exactly those that have tensors."""
    targets = source.config.get("target_modules") or []
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    chosen: dict[str, Any] = {name: source.config.get(name) for name in names}
    linears = _linears(model)
    named = targets
    if isinstance(targets, str) and targets.lower() == "all-linear":  # as in PEFT: all linears except the head
        head = model.get_output_embeddings()
        named = [path for path in linears if model.get_submodule(path) is not head]
    try:
        config = LoraConfig(target_modules=named, **chosen)
        wanted = {path for path in linears if check_target_module_exists(config, path)}
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterError(f"{PEFT_CONFIG}: target_modules={targets!r}: {error}") from error
    for path in sorted(wanted - adapted):
        raise AdapterError(f"{path}: target_modules names it, but there are no tensors for it")
    for path in sorted(adapted - wanted):
        raise AdapterError(f"{path}: there are tensors for it, but target_modules={targets!r} does not name it")
