"""Find where adapters go in a base model.

The layers are found in `layer_stacks.py`, and the feed-forward block inside a layer in `feed_forward.py`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from torch import nn

from .feed_forward import FeedForwardStructure, Form, find_feed_forward
from .fused_experts import experts_in
from .layer_stacks import find_layer_stacks, linears_in
from .linear_layers import is_split, keep_4bit_weights_exact, whole_weights


@dataclass(frozen=True)
class LinearSite:
    """A linear that gets LoRA or DoRA: its canonical name (``layers.3.self_attn.q_proj``) and its path in the base."""

    name: str
    path: str
    out_features: int
    in_features: int


@dataclass(frozen=True)
class RoutedSite(LinearSite):
    """A linear that gets a router and LoRA experts, in the decoder layer with the canonical name `layer`."""

    num_experts: int
    layer: str

    @property
    def hidden_size(self) -> int:
        return self.in_features


@dataclass(frozen=True)
class MixtureSite:
    """A feed-forward block that gets a router and experts on the projections in `targets`."""

    name: str
    path: str
    structure: FeedForwardStructure
    hidden_size: int
    targets: tuple[tuple[str, int, int], ...]  # projection, out_features, in_features
    num_experts: int
    layer: str


@dataclass(frozen=True)
class ExpertsSite:
    """Stacked experts of the base that get LoRA or DoRA on the parameters in `targets`."""

    name: str
    path: str
    num_experts: int
    targets: tuple[tuple[str, int, int], ...]  # parameter, out_features, in_features


Site = LinearSite | MixtureSite | ExpertsSite


def is_routed(site: Site) -> TypeGuard[MixtureSite | RoutedSite]:
    """Whether a site has a router."""
    return isinstance(site, (MixtureSite, RoutedSite))


def matches_target(path: str, targets: Sequence[str] | Literal["all-linear"]) -> bool:
    """Whether a path ends with one of `targets` at a dot; "all-linear" matches every path."""
    return targets == "all-linear" or any(path == target or path.endswith("." + target) for target in targets)


def refuse_adapted(base: nn.Module) -> None:
    """Raise if `base` already carries an adapter, of ours or of PEFT, or is split over processes."""
    by_fsdp2 = any(hasattr(module, "unshard") for module in base.modules())
    parameters: Any = base.named_parameters()
    for name, parameter in parameters:
        if is_split(parameter) and not (by_fsdp2 and parameter.device_mesh.ndim == 1):
            raise ValueError(
                f"base {type(base).__name__}: {name} is split over processes, but not by FSDP2 over a mesh of one "
                "dimension: put the adapter on a whole base, and split both then; tp_plan= is not supported"
            )
    for path, module in base.named_modules():
        if any(hasattr(module, name) for name in ("base_layer", "base_block", "peft_config")):
            raise ValueError(
                f"base {type(base).__name__} already carries an adapter ({path or 'the model itself'} is a "
                f"{type(module).__name__}): pass the plain base, which unload() of the adapted model gives back"
            )


def plan_sites(base: nn.Module, config: Any) -> list[Site]:
    """Return every place where `config` puts an adapter on `base`, layer by layer. Nothing is changed.

    Raises:
        ValueError: the base is adapted already or not understood (the message has the module's path), or a name in
            `target_modules` matches nothing.
    """
    refuse_adapted(base)
    keep_4bit_weights_exact(base)  # before a block is called below
    known: dict[Any, Form] = {}
    sites: list[Site] = []
    stacks = find_layer_stacks(base, config.towers)
    found_layers = [
        (index, layer, f"{path}.{index}", f"{name}.{index}")
        for name, (path, layers) in stacks.items()
        for index, layer in enumerate(layers)
    ]
    if type(config).model_type == "mixlora" and len(stacks) > 1:
        raise ValueError(
            f"base {type(base).__name__}: a MixLoRA goes into one list of layers, not {list(stacks)}; pass towers=[one]"
        )
    of_linears = getattr(config, "router_scope", None) == "linear"
    has_encoder = getattr(base.config, "is_encoder_decoder", False)
    if of_linears and has_encoder and any(name.startswith("decoder.") for name in stacks):
        raise ValueError(
            f'router_scope="linear": the cross-attention of {type(base).__name__}\'s decoder has linears for its own '
            "tokens and for the encoder's, which one routing cannot count: take the encoder, or router_scope=None"
        )
    experts = config.experts_by_layer(len(found_layers)) if type(config).model_type == "mixlora" else []
    for index, layer, where, name in found_layers:
        shapes, block = linears_in(layer), None
        if type(config).model_type == "mixlora" and not of_linears:
            # In every layer: a block is called once per kind, and a skeleton of a base has only its first one filled.
            with whole_weights(base, where):
                found = find_feed_forward(layer, where, known)
            block = found if config.has_mixture(index) else None
        for path, shape in shapes.items():
            in_block = block is not None and path.startswith(block[0] + ".")
            if not in_block and matches_target(f"{name}.{path}", config.target_modules):
                linear = (f"{name}.{path}", f"{where}.{path}", *shape)
                routed = of_linears and config.has_mixture(index)
                sites.append(RoutedSite(*linear, experts[index], name) if routed else LinearSite(*linear))
        for path, shapes_of in experts_in(layer).items() if config.target_parameters else ():
            chosen = [p for p in shapes_of if matches_target(f"{name}.{path}.{p}", config.target_parameters)]
            sizes = tuple((each, *shapes_of[each][1:]) for each in chosen)
            if sizes:
                sites.append(ExpertsSite(f"{name}.{path}", f"{where}.{path}", shapes_of[chosen[0]][0], sizes))
        if block is not None:
            block_path, structure = block
            paths = {projection: f"{block_path}.{projection}" for projection in (*structure.inputs, structure.output)}
            targets = tuple(
                (p, *shapes[path])
                for p, path in paths.items()
                if matches_target(f"{name}.{path}", config.target_modules)
            )
            if targets:
                hidden = shapes[paths[structure.output]][0]
                place = (f"{name}.{block_path}", f"{where}.{block_path}")
                sites.append(MixtureSite(*place, structure, hidden, targets, experts[index], name))
    if own := [s.path for s in sites if any(hasattr(m, "unshard") for m in base.get_submodule(s.path).modules())]:
        raise ValueError(
            f"base {type(base).__name__}: FSDP2 has split {own[0]} as a group of its own: call fully_shard on whole "
            "layers and on the base, not on the modules that get an adapter"
        )
    _check_targets(config, {name: layer for _, layer, _, name in found_layers}, sites)
    return sites


def _check_targets(config: Any, layers: Mapping[str, nn.Module], sites: Sequence[Site]) -> None:
    available = sorted({path for layer in layers.values() for path in linears_in(layer)})
    names = [f"{name}.{path}" for name, layer in layers.items() for path in linears_in(layer)]
    targets = () if config.target_modules == "all-linear" else config.target_modules
    if unknown := [t for t in targets if not any(matches_target(name, [t]) for name in names)]:
        raise ValueError(f"target_modules={unknown}: the base has no such linear in its layers; it has {available}")
    adapted = [f"{site.name}.{each}" for site in sites if isinstance(site, ExpertsSite) for each, *_ in site.targets]
    if unknown := [t for t in config.target_parameters or () if not any(matches_target(name, [t]) for name in adapted)]:
        every = {f"{path}.{p}" for layer in layers.values() for path, found in experts_in(layer).items() for p in found}
        raise ValueError(
            f"target_parameters={unknown}: the base has no such parameters of experts; it has {sorted(every)}"
        )
    names += adapted
    for field in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, field):
            if not any(re.fullmatch(rf"(.*\.)?({key})", name) for name in names):
                raise ValueError(f"{field}[{key!r}]: matches no linear in the base's layers; it has {available}")
    if type(config).model_type == "mixlora" and not any(is_routed(site) for site in sites):
        if not any(config.has_mixture(index) for index in range(len(layers))):
            raise ValueError(
                f"router_sparse_step={config.router_sparse_step}: layer 1 would be the first mixture; the base has "
                f"{len(layers)}"
            )
        raise ValueError(
            f"target_modules={config.target_modules}: a MixLoRA needs at least one projection of the feed-forward "
            f"block; the base has {available}"
        )
