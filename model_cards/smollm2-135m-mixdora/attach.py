"""Put an adapter's modules into a base and take them out; the canonical names and shapes of its tensors.

Canonical names start at the decoder layers, whatever the base calls them and whether it has a head:
``layers.<i>.<path of a linear>.lora_A``, ``.lora_B``, ``.magnitude`` for LoRA and DoRA, and for a mixture
``layers.<i>.<path of the block>.router`` and ``layers.<i>.<path of the block>.experts.<projection>.lora_A`` and so on,
stacked over the experts. A linear with a router has ``layers.<i>.<path>.router``, ``.experts.lora_A`` and ``.lora_B``.
On stacked experts of the base: ``layers.<i>.<path of the experts>.<parameter>.lora_A``.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapted_linear import AdaptedLinear, LowRankUpdate
from .base_structure import ExpertsSite, LinearSite, MixtureSite, RoutedSite, Site, is_routed
from .fused_experts import AdaptedExperts, ExpertsLinear
from .linear_layers import is_split, layer_device, restore_linears, row_norms_squared, speed_up_linears, whole_weights
from .mixture import MixtureOfLoraExperts
from .routed_linear import RoutedLinear
from .routing import routing_of

STACKED = "experts"
Tensors = dict[str, Tensor]


class PlannedUpdate(NamedTuple):
    """A low-rank update at a site: its canonical name, the projection in a mixture's block, and its shapes."""

    name: str
    projection: str | None
    r: int
    scaling: float
    shape_a: tuple[int, ...]
    shape_b: tuple[int, ...]


def updates_at(site: Site, config: Any) -> Iterator[PlannedUpdate]:
    """Every low-rank update at a site."""
    if isinstance(site, LinearSite):
        r, scaling = config.rank_and_scaling(site.name, config.r, config.lora_alpha)
        stack = [site.num_experts] if isinstance(site, RoutedSite) else []
        name = f"{site.name}.{STACKED}" if stack else site.name
        yield PlannedUpdate(name, None, r, scaling, (*stack, r, site.in_features), (*stack, site.out_features, r))
        return
    for projection, out_features, in_features in site.targets:
        name = f"{site.name}.{projection}"
        if isinstance(site, ExpertsSite):
            r, scaling = config.rank_and_scaling(name, config.r, config.lora_alpha)
        else:
            r, scaling = config.expert_rank_and_scaling(name)
            name = f"{site.name}.{STACKED}.{projection}"
        shapes = (site.num_experts, r, in_features), (site.num_experts, out_features, r)
        yield PlannedUpdate(name, projection, r, scaling, *shapes)


def expected_tensors(config: Any, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """{canonical name: shape} of an adapter with this configuration on these sites."""
    shapes: dict[str, tuple[int, ...]] = {}
    for site in sites:
        if is_routed(site):
            shapes[f"{site.name}.router"] = (site.num_experts, site.hidden_size)
        for update in updates_at(site, config):
            shapes[f"{update.name}.lora_A"], shapes[f"{update.name}.lora_B"] = update.shape_a, update.shape_b
            if config.use_dora:
                shapes[f"{update.name}.magnitude"] = update.shape_b[:-1]
    return shapes


def attach(base: nn.Module, config: Any, sites: Sequence[Site], *options: Any) -> None:
    """Freeze `base` and put an adapter into it, in place. Everything is built first: a failure leaves it as it was.

    In a base that FSDP2 has split, each module's adapter is split over the same processes, as a group of its own.
    The base's own linears multiply few rows faster from then on, those without an adapter and the head too.

    Args: see `build_modules`, which gets the `options`.
    """
    of_base: set[Any] = set(base.parameters())
    mesh = next((parameter.device_mesh for parameter in of_base if is_split(parameter)), None)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and mesh is None and not torch.accelerator.is_available():
        text = "accelerate's FSDP splits nothing on CPUs: each process trains a whole copy; call fully_shard(model)"
        warnings.warn(text, stacklevel=4)
    modules = build_modules(base, config, sites, *options)
    for parameter in of_base:
        parameter.requires_grad_(False)
    for path, module in modules.items():
        replace_module(base, path, module)
        if mesh is not None:
            from torch.distributed.fsdp import fully_shard  # not in every torch

            module.register_forward_hook(lambda module, args, out: out.clone())  # FSDP2 loses its hook on a view
            fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=of_base)
    speed_up_linears(base)


def build_modules(
    base: nn.Module,
    config: Any,
    sites: Sequence[Site],
    tensors: Tensors | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Build the modules of an adapter, {path in the base: module}, over the base's own, which stay in place.

    Args:
        base: the plain base.
        config: the adapter's configuration.
        sites: where it goes, from `plan_sites`.
        tensors: {canonical name: tensor}, already checked. None: fresh ones, with which an expert computes what the
            base does, since B is zero.
        seed: seed of fresh tensors; torch's global random state is left alone.
        dtype: dtype of the adapter's tensors. Default: as they are (fresh ones float32). Magnitudes are always float32.
    """
    generator = torch.Generator().manual_seed(seed)
    modules: dict[str, Any] = {}
    for site in sites:
        module = base.get_submodule(site.path)
        updates: dict[Any, LowRankUpdate] = {}
        for update in updates_at(site, config):
            of_experts = isinstance(site, ExpertsSite) and ExpertsLinear(module, str(update.projection))
            layer = of_experts or module.get_submodule(update.projection or "")
            with whole_weights(base, site.path):
                updates[update.projection] = _update(layer, update, config, tensors, generator, dtype)
        if isinstance(site, ExpertsSite):
            modules[site.path] = AdaptedExperts(module, updates)
            continue
        if not is_routed(site):
            modules[site.path] = AdaptedLinear(module, updates[None])
            continue
        if tensors is None:
            router = torch.empty((site.num_experts, site.hidden_size), device="cpu", dtype=torch.float32)
            router.normal_(0.0, config.router_init_range, generator=generator)
        else:
            router = tensors[f"{site.name}.router"]
        first = site.structure.inputs[0] if isinstance(site, MixtureSite) else ""
        router = router.to(device=layer_device(module.get_submodule(first)), dtype=dtype or router.dtype)
        routing, noise = routing_of(config), config.router_jitter_noise
        if isinstance(site, MixtureSite):
            rest = routing, noise, config.expert_dropout, site.layer
            modules[site.path] = MixtureOfLoraExperts(module, site.structure, router, updates, *rest)
        else:
            modules[site.path] = RoutedLinear(module, updates[None])
            modules[site.path].set_router(router, routing, noise, site.layer)
    return modules


def detach(base: nn.Module, sites: Sequence[Site]) -> None:
    """Take the adapter out of `base` again, which is then as it was."""
    for site in sites:
        module: Any = base.get_submodule(site.path)
        replace_module(base, site.path, module.base_block if isinstance(site, MixtureSite) else module.base_layer)
    restore_linears(base)


def adapter_parameters(base: nn.Module, sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    """{canonical name: parameter} of the adapter in `base`."""
    parameters: dict[str, nn.Parameter] = {}
    for site in sites:
        module: Any = base.get_submodule(site.path)
        if is_routed(site):
            parameters[f"{site.name}.router"] = module.router
        if isinstance(site, LinearSite):
            updates = {f"{site.name}.{STACKED}" if is_routed(site) else site.name: module.update}
        elif isinstance(site, ExpertsSite):
            updates = {f"{site.name}.{name}": update for name, update in module.updates.items()}
        else:
            updates = {f"{site.name}.{STACKED}.{name}": update for name, update in module.experts.items()}
        for name, update in updates.items():
            parameters.update((f"{name}.{leaf}", parameter) for leaf, parameter in update.named_parameters())
    return parameters


def merge_into_base(base: nn.Module, sites: Sequence[Site]) -> None:
    """Write the merged weights of linears and stacked experts into the base's layers; the adapter's modules stay."""
    if any(map(is_split, base.parameters())):
        raise ValueError("cannot merge into a base split over processes: merge the saved adapter into a whole one")
    layers: list[Any] = [base.get_submodule(site.path) for site in sites]
    merged = [layer.merged_weights() for layer in layers]
    holders = weight_holders(base)
    for site, layer, weights in zip(sites, layers, merged, strict=True):
        held_by = [path for name in weights for path in holders[id(getattr(layer.base_layer, name))]]
        if others := [path for path in held_by if base.get_submodule(path) is not layer]:
            raise ValueError(f"cannot merge into {site.path}: {', '.join(others)} shares its weight and would change")
    with torch.no_grad():
        for layer, weights in zip(layers, merged, strict=True):
            for name, weight in weights.items():
                getattr(layer.base_layer, name).copy_(weight)


def weight_holders(base: nn.Module) -> dict[int, list[str]]:
    """{id of a parameter: paths of the modules that hold it}. A tied weight has several."""
    holders: dict[int, list[str]] = {}
    for path, module in base.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(path.removesuffix(".base_layer"))
    return holders


def replace_module(base: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module into `base` at a path."""
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _update(
    layer: Any, update: PlannedUpdate, config: Any, tensors: Tensors | None, generator: torch.Generator, dtype: Any
) -> LowRankUpdate:
    norms = row_norms_squared(layer) if config.use_dora else None
    magnitude = None
    if tensors is None:
        bound = update.shape_a[-1] ** -0.5  # which is PEFT's Kaiming-uniform with a = sqrt(5)
        lora_a = torch.empty(update.shape_a, dtype=torch.float32, device="cpu")
        lora_a.uniform_(-bound, bound, generator=generator)
        lora_b = torch.zeros(update.shape_b, dtype=torch.float32, device="cpu")
        if norms is not None:
            magnitude = norms.sqrt().expand(update.shape_b[:-1]).clone()
    else:
        lora_a, lora_b = tensors[f"{update.name}.lora_A"], tensors[f"{update.name}.lora_B"]
        magnitude = tensors[f"{update.name}.magnitude"] if config.use_dora else None
    device = layer_device(layer)
    lora_a, lora_b = (tensor.to(device=device, dtype=dtype or tensor.dtype) for tensor in (lora_a, lora_b))
    magnitude = None if magnitude is None else magnitude.to(device)
    return LowRankUpdate(lora_a, lora_b, magnitude, update.scaling, config.lora_dropout, norms)
