"""Find where adapters go in a base model, by its structure instead of a list of model names.

The layers are found in `layer_stacks.py`. Inside a layer, a feed-forward block is a module with two or three linears
and one activation that, called with hidden states, computes what one of the three known forms computes. That is checked
by calling it, so a block that does something else (a sparse mixture, an extra normalisation) is refused instead of
being adapted wrongly.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from .fused_experts import experts_in
from .layer_stacks import Shapes, find_layer_stacks, linears_in
from .linear_layers import compute_dtype, is_split, keep_4bit_weights_exact, layer_device, linear_shape

ADAPTED_CLASSES = ("AdaptedLinear", "AdaptedExperts", "MixtureOfLoraExperts", "RoutedLinear")
Form = tuple[tuple[str, ...], str, bool | None, bool]
"""A reading of a block: inputs, output and gate_first of a `FeedForwardStructure`, and whether its dropouts swap."""


class FeedForwardStructure:
    """The linears of a feed-forward block and what happens between them.

    Attributes:
        inputs: names of the projections of the block's input, in the order that `activate` takes their outputs:
            ``(gate, up)``, ``(gate_up,)`` for a fused pair, or ``(up,)`` for a block without a gate.
        output: name of the projection back to the hidden size.
        gate_first: in a fused pair, whether the gate is its first half.
        inner, dropout: what drops values before the output projection (None in most blocks), and after it.
    """

    def __init__(self, form: Form, activation: Callable, dropouts: Sequence[nn.Module] = ()) -> None:
        self.inputs, self.output, self.gate_first, swapped = form
        # The block owns these modules; they are held here without registering them a second time.
        self.activation = activation
        inner, dropout = [*dropouts, None, None][:2][:: 1 if swapped else -1]
        self.inner, self.dropout = inner, dropout or nn.Identity()

    def activate(self, *projected: Tensor) -> Tensor:
        """(…, out) per input projection -> (…, ff). Without gradients the arguments may be written to."""
        if self.gate_first is not None:
            first, second = projected[0].chunk(2, dim=-1)
            projected = (first, second) if self.gate_first else (second, first)
        hidden = self.activation(projected[0])
        if len(projected) > 1:
            up = projected[1]
            # In place where possible: a fresh tensor of this size costs more than the product.
            hidden = hidden * up if torch.is_grad_enabled() else hidden.mul_(up)
        return hidden if self.inner is None else self.inner(hidden)

    def __call__(self, block: nn.Module, x: Tensor) -> Tensor:
        """Compute the whole block from its parts."""
        hidden = self.activate(*(block.get_submodule(name)(x) for name in self.inputs))
        return self.dropout(block.get_submodule(self.output)(hidden))


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
    if parts := [name for name, parameter in base.named_parameters() if is_split(parameter)]:
        raise ValueError(
            f"base {type(base).__name__}: {parts[0]} is split over processes: put the adapter on a whole base, and "
            "split both with FSDP2's fully_shard; tp_plan= and DeepSpeed's ZeRO-3 are not supported"
        )
    for path, module in base.named_modules():
        peft_layer = hasattr(module, "base_layer") and hasattr(module, "active_adapters")
        if type(module).__name__ in ADAPTED_CLASSES or peft_layer or hasattr(module, "peft_config"):
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
    experts = config.experts_by_layer(len(found_layers)) if type(config).model_type == "mixlora" else []
    for index, layer, where, name in found_layers:
        shapes, block = linears_in(layer), None
        if type(config).model_type == "mixlora" and not of_linears:
            # In every layer: a block is called once per kind, and a skeleton of a base has only its first one filled.
            found = _find_feed_forward(layer, where, known)
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


def _find_feed_forward(layer: nn.Module, where: str, known: dict[Any, Form]) -> tuple[str, FeedForwardStructure]:
    """Find the layer's one feed-forward block: (path in the layer, structure)."""
    candidates = []
    for path, module in layer.named_modules():
        if path and len(_direct_linears(module)) in (2, 3) and _takes_hidden_states_only(module):
            structure = _recognise(module, f"{where}.{path}", known)
            if structure is not None:
                candidates.append((path, structure))
    if len(candidates) == 1:
        return candidates[0]
    if paths := [path for path, _ in candidates]:
        raise ValueError(f"{where} has {len(paths)} feed-forward blocks ({paths}), not one")
    blocks = [f"{where}.{path} ({type(m).__name__})" for path, m in layer.named_children() if linears_in(m)]
    raise ValueError(
        f"{where} ({type(layer).__name__}): no feed-forward block of a known form (a gated one, a fused gated "
        f"one, or two linears with an activation between) was found; its blocks are {blocks}"
    )


def _direct_linears(module: nn.Module) -> Shapes:
    return {name: shape for name, child in module.named_children() if (shape := linear_shape(child))}


def _takes_hidden_states_only(module: nn.Module) -> bool:
    """Whether forward has one required argument: attention needs positions or a mask, a feed-forward block does not."""
    parameters = inspect.signature(module.forward).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.default is p.empty and p.kind in positional for p in parameters) == 1


def _recognise(block: nn.Module, path: str, known: dict[Any, Form]) -> FeedForwardStructure | None:
    """Return the structure of `block`, verified by calling it; None if no known form fits.

    `known` keeps the form per class and shapes, so a deep model is verified once and not in every layer.
    """
    linears = _direct_linears(block)
    others = [(name, child) for name, child in block.named_children() if name not in linears]
    dropouts = [child for _, child in others if isinstance(child, nn.Dropout) and child.p > 0]
    activations: list[Callable] = [
        c for _, c in others if not isinstance(c, nn.Dropout) and not any(True for _ in c.parameters())
    ]
    if not activations:  # a plain function, kept as an attribute
        attributes = vars(block).items()
        activations = [value for name, value in attributes if not name.startswith("_") and callable(value)]
    if len(activations) != 1 or len(dropouts) > 2:
        return None
    signature = (type(block), tuple(linears.items()))
    for form in [known[signature]] if signature in known else _possible_forms(linears, bool(dropouts)):
        structure = FeedForwardStructure(form, activations[0], dropouts)
        if signature in known or _computes_the_same(structure, block, path):
            known[signature] = form
            return structure
    return None


def _possible_forms(linears: Shapes, with_dropout: bool) -> list[Form]:
    """Every reading of the shapes as a known form."""
    forms: list[tuple[tuple[str, ...], str, bool | None]] = []
    for output, (hidden, inner) in linears.items():
        inputs = [name for name in linears if name != output]
        shapes = [linears[name] for name in inputs]
        if len(inputs) == 2 and shapes == [(inner, hidden)] * 2:
            forms += [(tuple(inputs), output, None), (tuple(reversed(inputs)), output, None)]
        if len(inputs) == 1 and shapes == [(2 * inner, hidden)]:
            forms += [((inputs[0],), output, True), ((inputs[0],), output, False)]
        if len(inputs) == 1 and shapes == [(inner, hidden)]:
            forms.append(((inputs[0],), output, None))
    return [(*form, swapped) for form in forms for swapped in (False, True)[: 1 + with_dropout]]


def _mark(slope: float, dropout: nn.Module, args: Any, out: Tensor) -> Tensor:
    """Change the output of a dropout, which in evaluation does nothing wherever it is."""
    return out * torch.linspace(1 - slope, 1 + slope, out.shape[-1], device=out.device, dtype=out.dtype)


@torch.no_grad()
def _computes_the_same(structure: FeedForwardStructure, block: nn.Module, path: str) -> bool:
    """Whether the block, called as a whole, gives what `structure` computes from its parts."""
    first = block.get_submodule(structure.inputs[0])
    device, hidden = layer_device(first), _direct_linears(block)[structure.inputs[0]][1]
    if device.type == "meta":
        raise ValueError(f"{path} lies on the meta device: load the base's weights before adapting it")
    # Deterministic, so that adapting a model does not touch the random state; varied, so that forms differ.
    x = torch.sin(torch.arange(4 * hidden, device=device, dtype=torch.float32))
    x = x.view(1, 4, hidden).to(compute_dtype(first))
    was_training = block.training
    block.eval()
    places = {0.5: structure.inner, -0.5: structure.dropout}
    marks = [d.register_forward_hook(partial(_mark, s)) for s, d in places.items() if isinstance(d, nn.Dropout)]
    try:
        expected, got = block(x), structure(block, x)
    except (TypeError, RuntimeError):  # another signature or other shapes: not this form
        return False
    finally:
        for mark in marks:
            mark.remove()
        block.train(was_training)
    if not isinstance(expected, torch.Tensor) or expected.shape != got.shape:
        return False
    expected, got = expected.float(), got.float()
    return bool((expected - got).abs().max() <= 1e-2 * expected.abs().max())
