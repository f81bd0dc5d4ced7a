"""Find the modules of a model that a PEFT configuration names, as sites of `remote_code`. Nothing is changed here.

PEFT's ways of naming (endings, regular expressions, exclusions, layer indices) choose among the linears of the decoder
layers; `remote_code.base_structure` finds which of them form a feed-forward block, and what its parts do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig
from peft.utils import AuxiliaryTrainingWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel

from minilora_hub.integrations.trl import ATTRIBUTE
from minilora_hub.remote_code.base_structure import LinearSite, MixtureSite, plan_sites
from minilora_hub.remote_code.layer_stacks import find_layer_stacks, linears_in
from minilora_hub.remote_code.linear_layers import is_split
from minilora_hub.remote_code.probe import every_expert, find_without_effect, warn_of_left_out
from minilora_hub.remote_code.trial_inputs import input_device

OWN_NAMES = {
    "base_layer",
    "experts",
    "lora_A",
    "lora_B",
    "lora_magnitude_vector",
    "moe_lora",
    "router",
    "update",
    "weight",
}


@dataclass(frozen=True)
class Plan:
    """The sites of one adapter.

    Attributes:
        config: the adapter's MixLoraConfig or AdapterConfig.
        sites: the adapter's sites, named by the base's own paths.
        linears: paths of the linears that are adapted.
        target_modules: names of the targets, resolved where the configuration says "all-linear".
        excluded: whether the configuration excludes any module.
    """

    config: Any
    sites: list[Any]
    linears: list[str]
    target_modules: Any
    excluded: bool


@contextmanager
def plain_base(model: nn.Module, layer_class: type) -> Iterator[None]:
    """Temporarily restore the plain base: without our adapters, and without modules in PEFT's `modules_to_save`."""
    places: list[tuple[nn.Module, str, Any]] = []
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, (layer_class, AuxiliaryTrainingWrapper)):
                places.append((module, name, child))
    known = model.__dict__.pop("peft_config", None)
    router_loss = model.__dict__.get(ATTRIBUTE)
    layers = router_loss.layers if router_loss else []
    if router_loss:  # the base may be run here, without an adapter's losses
        router_loss.layers = []
    for parent, name, wrapper in places:
        own = isinstance(wrapper, layer_class)
        parent._modules[name] = wrapper.base_layer if own else wrapper.original_module
    try:
        yield
    finally:
        for parent, name, wrapper in places:
            parent._modules[name] = wrapper
        if router_loss:
            router_loss.layers = layers
        if known is not None:
            model.__dict__["peft_config"] = known


def holder_of(model: nn.Module, path: str, layer_class: Any) -> tuple[nn.Module, str]:
    """Return the (module, attribute) that hold the module at this path of the plain base, through wrapping layers.

    Raises:
        ValueError: the module, or one that it is a part of, is trained whole for another adapter.
    """
    module: Any = model
    parts = path.split(".")
    for depth, part in enumerate(parts, start=1):
        holder = module.base_layer if isinstance(module, layer_class) else module
        module = getattr(holder, part)
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"target_modules: {path} cannot be adapted: {'.'.join(parts[:depth])} is in modules_to_save of "
                f"{sorted(module._adapters)}"
            )
    return holder, part


def plan_adapter(model: Any, config: Any, adapter_name: str, matches: Callable[[Any, str], Any]) -> Plan:
    """Find every site of one adapter on a plain base.

    Args:
        model: the base, plain (see `plain_base`).
        config: a `MixLoraPeftConfig` or `PeerLoraConfig`.
        adapter_name: its name, which goes into the names of its tensors.
        matches: PEFT's answer to whether a configuration names a path; falsy, and neither False nor None, where it
            excludes it.

    Raises:
        ValueError: a target is no linear of a decoder layer and no feed-forward block, matches nothing, or is of a form
            that is not known; the base is split over processes; or the adapter's name cannot be used.
    """
    _check_name(model, adapter_name)
    if split := [name for name, parameter in model.named_parameters() if is_split(parameter)]:
        raise ValueError(
            f"base {type(model).__name__}: {split[0]} is split over processes: call get_peft_model on a whole base, "
            "and fully_shard on both; or use MixLoraForCausalLM.from_base, which takes a base that FSDP2 has split"
        )
    act_fn, own = getattr(config, "act_fn", None), getattr(model.config.get_text_config(), "hidden_act", None)
    if act_fn not in (None, own):
        raise ValueError(f"act_fn={act_fn!r}: the base's activation is {own!r}, which its experts share")
    ours = config.model_config()
    everywhere = copy.copy(ours)
    everywhere.target_modules, everywhere.rank_pattern, everywhere.alpha_pattern = "all-linear", {}, {}
    sites = plan_sites(model, everywhere)
    layers = {
        f"{prefix}.{index}": layer
        for prefix, stack in find_layer_stacks(model).values()
        for index, layer in enumerate(stack)
    }
    linears = {f"{where}.{path}" for where, layer in layers.items() for path in linears_in(layer)}
    # It is not known how to call a model that is not of transformers, so that is not run.
    if _are_all(config.target_modules) and isinstance(model, PreTrainedModel) and input_device(model).type != "meta":
        useless = find_without_effect(model, sites)
        if useless:
            warn_of_left_out("all-linear", useless)
        linears -= useless.keys()
        if ours.model_type == "mixlora":
            every_expert(model, ours)  # refuses them
    blocks = _blocks(sites, layers)
    asked = copy.copy(config)
    asked.target_modules = _resolved(config.target_modules, model, linears, layers)
    answers = {path: matches(asked, path) for path, _ in model.named_modules() if path}
    _check_targets(asked, answers, linears, blocks, model)
    chosen = {path for path in linears if _is_chosen(path, answers, blocks)}
    sites = [kept for site in sites if (kept := _narrowed(site, chosen)) is not None]
    if ours.model_type == "mixlora" and not any(isinstance(site, MixtureSite) for site in sites):
        raise ValueError(
            f"target_modules={config.target_modules}: a MixLoRA needs at least one projection of a feed-forward block; "
            f"the base's blocks are {sorted(blocks)[:3]}…"
        )
    if not chosen:
        raise NoMatchingPeftModuleError(f"target_modules={config.target_modules!r}: matches no linear of the base")
    targeted = [path for path in answers if path in chosen]
    _check_patterns(config, targeted)
    excluded = any(_is_excluded(answer) for answer in answers.values())
    return Plan(ours, sites, targeted, asked.target_modules, excluded)


def _is_excluded(answer: Any) -> bool:
    """Whether PEFT's answer means that the configuration excludes the module, rather than does not name it."""
    return not answer and answer not in (False, None)


def _is_chosen(path: str, answers: dict[str, Any], blocks: set[str]) -> bool:
    """Whether a linear, or the feed-forward block it is in, is named, and neither of the two is excluded."""
    given = [answers[path], *(answers[block] for block in blocks if path.startswith(block + "."))]
    return any(given) and not any(_is_excluded(answer) for answer in given)


def _check_name(model: nn.Module, name: str) -> None:
    parts = {part for path, _ in model.named_modules() for part in path.split(".")} | OWN_NAMES
    if "." in name or name in parts:
        raise ValueError(
            f"adapter_name={name!r}: must not be a part of a module's path, for which it would be mistaken"
        )


def _in_layer(path: str, layers: Iterable[str]) -> str:
    """Return a path in the base as the path in its layer."""
    return next(path.removeprefix(f"{layer}.") for layer in layers if path.startswith(f"{layer}."))


def _blocks(sites: list[Any], layers: dict[str, nn.Module]) -> set[str]:
    """Paths of every layer's feed-forward block, those without a mixture included."""
    inner = {_in_layer(site.path, layers) for site in sites if isinstance(site, MixtureSite)}
    return {
        f"{where}.{path}" for where, layer in layers.items() for path in inner & {p for p, _ in layer.named_modules()}
    }


def _are_all(targets: Any) -> bool:
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def _resolved(targets: Any, model: nn.Module, linears: set[str], layers: Iterable[str]) -> Any:
    """Return the targets; for "all-linear", the shortest names that match exactly these linears."""
    if not _are_all(targets):
        return targets
    others = {path.rpartition(".")[2] for path, _ in model.named_modules() if path not in linears}
    names = set()
    for path in linears:
        leaf = path.rpartition(".")[2]
        names.add(_in_layer(path, layers) if leaf in others else leaf)
    return sorted(names)


def _check_targets(config: Any, answers: dict[str, Any], linears: set[str], blocks: set[str], model: nn.Module) -> None:
    for path, answer in answers.items():
        if answer and path not in linears and path not in blocks:
            kind = type(model.get_submodule(path)).__name__
            raise ValueError(
                f"target_modules={config.target_modules!r} names {path} ({kind}), which is neither a linear of a "
                "decoder layer nor a feed-forward block; name it in modules_to_save to train it whole"
            )
    if isinstance(config.target_modules, str) or isinstance(
        config, LoraConfig
    ):  # PEFT's LoRA lets a name match nothing
        return
    known = linears | blocks
    for target in config.target_modules:
        if not any(path == target or path.endswith("." + target) for path in known):
            leaves = sorted({path.rpartition(".")[2] for path in known})
            raise ValueError(f"target_modules={[target]}: the base has no such linear in its layers; it has {leaves}")


def _check_patterns(config: Any, targeted: list[str]) -> None:
    for name in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, name):
            if not any(re.fullmatch(rf"(.*\.)?({key})", path) for path in targeted):
                raise ValueError(f"{name}[{key!r}]: matches none of the linears that this adapter is on")


def _narrowed(site: Any, chosen: set[str]) -> Any:
    """Return the site under the base's own path, reduced to the chosen linears; None if there are none."""
    if isinstance(site, LinearSite):
        return replace(site, name=site.path) if site.path in chosen else None
    targets = tuple(target for target in site.targets if f"{site.path}.{target[0]}" in chosen)
    return replace(site, name=site.path, targets=targets) if targets else None
