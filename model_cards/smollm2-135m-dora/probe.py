"""Find where adapters would have an effect, by running the base once on a few tokens.

A module that looks like a linear need not be called as one: Mamba reads the weight of its `dt_proj`, Llama 4's router
returns a tuple, and a result may be used where no gradient passes. An adapter there would never learn, or change what
merging gives. So before a fresh adapter is built, the base runs on a few tokens in training and in evaluation (fused
kernels differ), and each module must be called, give a tensor, and pass a gradient on.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .base_structure import ExpertsSite, LinearSite, Site, matches_target, plan_sites, refuse_adapted
from .fused_experts import experts_in
from .layer_stacks import find_layer_stacks, is_dual_encoder
from .linear_layers import linear_shape
from .trial_inputs import TOKENS, input_device, trial_inputs

logger = logging.get_logger(__name__)


class TargetsWarning(UserWarning):
    """A fresh adapter leaves out modules that `target_modules` asks for."""


KEPT_BUFFER = 2**20
"""Number of values up to which a buffer is copied before the base runs. Larger ones are quantised weights."""


def settle_targets(base: Any, config: Any, refused: Mapping[str, str] | None = None) -> None:
    """Reduce `target_modules` of a fresh adapter's configuration to modules on which an adapter has an effect.

    The others are left out of "all-linear", which then becomes a list of names, with a warning that names them. It also
    stands for stacked experts, whose names go into `target_parameters`. A base on the meta device cannot be run:
    nothing is changed.

    Args:
        base: the plain base.
        config: the adapter's configuration. It is changed.
        refused: {path: reason} of modules that may not be adapted for another reason.

    Raises:
        ValueError: a name in `target_modules` stands for such modules only, "all-linear" was asked of a base with
            experts that cannot be adapted, a MixLoRA of any with stacked experts, or the base cannot be run.
    """
    if input_device(base).type == "meta":
        return
    refuse_adapted(base)
    asked = config.target_modules
    if type(config).model_type == "mixlora":
        every_expert(base, config)
    elif asked == "all-linear" and config.target_parameters is None:
        config.target_parameters = every_expert(base, config) or None
    sites = plan_sites(base, config)
    reasons = {**find_without_effect(base, sites), **(refused or {})}
    useless = [site for site in sites if site.path in reasons]
    linears = [site for site in sites if site.path not in reasons and not isinstance(site, ExpertsSite)]
    kept = {name for site in linears for name in _names(site)}
    if useless:
        left_out = {site.path: reasons[site.path] for site in useless}
        named = [] if asked == "all-linear" else asked
        lost = [target for target in named if not any(matches_target(name, [target]) for name in kept)]
        if lost or not kept or not all(isinstance(site, LinearSite) for site in useless):
            raise ValueError(f"target_modules={lost or asked!r}: adapters would have no effect on {_listed(left_out)}")
        warn_of_left_out(asked, left_out)
        config.target_modules = _shortest(kept, {name for site in useless for name in _names(site)})


def warn_of_left_out(asked: Any, reasons: Mapping[str, str]) -> None:
    """Warn that of the targets `asked` for, the modules in `reasons`, {path: reason}, get no adapter."""
    warnings.warn(f"target_modules={asked!r}: left out is {_listed(reasons)}", TargetsWarning, stacklevel=4)


def _names(site: Site) -> list[str]:
    """Canonical names of the linears that a site adapts."""
    if isinstance(site, LinearSite):
        return [site.name]
    return [f"{site.name}.{projection}" for projection, _, _ in site.targets]


def _listed(reasons: Mapping[str, str], most: int = 3) -> str:
    """List the first few paths of each reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in reasons.items():
        by_reason.setdefault(reason, []).append(path)
    return "; ".join(
        f"{', '.join(paths[:most])}{f' and {len(paths) - most} more' * (len(paths) > most)}: {reason}"
        for reason, paths in by_reason.items()
    )


def _shortest(kept: Iterable[str], left_out: Iterable[str]) -> list[str]:
    """Return target names that match `kept` and nothing in `left_out`: last parts, paths in a layer, or whole names."""
    path_in_layer = partial(re.sub, r"^.*?layers\.\d+\.", "")
    for part in (lambda name: name.rpartition(".")[2], path_in_layer, str):
        names = sorted({part(name) for name in kept})
        if not any(matches_target(name, names) for name in left_out):
            break
    return names


def every_expert(base: Any, config: Any) -> list[str]:
    """Return the names of all stacked experts of a base, as `target_parameters` has them.

    Raises:
        ValueError: some cannot be adapted: none can by a MixLoRA. The message names them.
    """
    fields, mixture = vars(base.config.get_text_config(decoder=True)).items(), type(config).model_type == "mixlora"
    counts = {value for name, value in fields if "experts" in name and isinstance(value, int)}
    names: set[str] = set()
    refused: dict[str, list[str]] = {}
    for stack, layers in find_layer_stacks(base, config.towers).values():
        for index, layer in enumerate(layers):
            known = {} if mixture else experts_in(layer)
            names.update(f"{path}.{name}" for path, parameters in known.items() for name in parameters)
            for path, module in layer.named_modules():
                if path in known or linear_shape(module) or isinstance(module, nn.modules.conv._ConvNd):
                    continue
                for name, parameter in module.named_parameters(recurse=False):
                    is_stack = parameter.dim() == 3 and parameter.shape[0] in counts
                    if is_stack or ("experts" in path.split(".") and parameter.dim() > 1):
                        refused.setdefault(f"{path}.{name}", []).append(f"{stack}.{index}")
    if refused:
        first = min(layer for found in refused.values() for layer in found)
        raise ValueError(
            f"target_modules={config.target_modules!r}: the experts of this base are stacked parameters, not linears, "
            f"and {'a MixLoRA' if mixture else 'an adapter'} cannot be put on them: {', '.join(refused)} in {first} "
            "and others; a LoRA or DoRA with target_parameters=[] leaves them out"
        )
    return sorted(names)


# ---- running the base ----


def find_without_effect(base: Any, sites: Sequence[Site]) -> dict[str, str]:
    """Return {path: reason} of the sites on which an adapter would have no effect.

    A few tokens do not reach the tower of images or sounds beside a language model: nothing is said of sites there.
    Of several experts that are modules, a few tokens need not call each: it is enough that they call one of its kind.

    Weights may be quantised or offloaded; weights, buffers, modes and random states are kept.

    Raises:
        ValueError: the base could not be run.
    """
    decoder = base.get_decoder()
    if decoder not in (base, base.base_model) and not (base.config.is_encoder_decoder or is_dual_encoder(base)):
        inside = set(decoder.modules())
        sites = [site for site in sites if base.get_submodule(site.path) in inside]
    first: dict[nn.Module, str] = {}
    reasons: dict[str, str] = {}
    for site in sites:
        module = base.get_submodule(site.path)
        if first.setdefault(module, site.path) != site.path:
            reasons[site.path] = f"it is {first[module]} again"
    can_learn = not any(parameter.is_inference() for parameter in base.parameters())
    if not can_learn:
        logger.warning("Whether every adapter gets a gradient is not known: the base was made in inference mode.")
    with _restored(base):
        for training in (True, False):
            base.train(training)
            for path, reason in _run(base, sites, training and can_learn).items():
                reasons.setdefault(path, reason)
    kinds = {site.path: re.sub(r"(?<!layers)\.\d+(?=\.)", ".*", site.name) for site in sites}
    alive = {kinds[site.path] for site in sites if site.path not in reasons}
    return {path: reason for path, reason in reasons.items() if reason != NEVER_CALLED or kinds[path] not in alive}


NEVER_CALLED = "the base does not call it (its weight is read directly, or not used)"


def _run(base: Any, sites: Sequence[Site], with_gradients: bool) -> dict[str, str]:
    """Return {path: reason} from one forward pass, and from its backward pass `with_gradients`."""
    reasons = {site.path: NEVER_CALLED for site in sites}
    cache = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    leaves: dict[str, Tensor] = {}
    hooks: list[Any] = []

    def hook_for(path: str) -> Callable:
        def hook(module: nn.Module, args: Any, out: Any) -> Tensor | None:
            if not isinstance(out, torch.Tensor):
                reasons[path] = f"it returns a {type(out).__name__} instead of a tensor"
                return None
            reasons.pop(path, None)
            if not with_gradients:
                return None
            if path not in leaves:
                leaves[path] = torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
            return out + leaves[path]  # like an adapter's output; its gradient shows whether it is used

        return hook

    try:
        for site in sites:
            hooks.append(base.get_submodule(site.path).register_forward_hook(hook_for(site.path)))
        with torch.inference_mode(False), torch.set_grad_enabled(with_gradients):
            outputs = base(**trial_inputs(base), **cache)
            out = outputs["logits"] if "logits" in outputs else outputs[0]
    except Exception as error:
        raise ValueError(
            f"base {type(base).__name__}: it could not be run on {TOKENS} tokens, which shows where an adapter has an "
            f"effect ({type(error).__name__}: {error})"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if with_gradients:
        for path, gradient in _gradients(out, leaves).items():
            if gradient is None:
                reasons[path] = "no gradient reaches it"
    return reasons


def _gradients(out: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    try:
        with torch.enable_grad():  # the caller may have switched it off
            found = torch.autograd.grad(out.float().sum(), list(leaves.values()), allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:  # a kernel that has no backward
        logger.warning(f"Whether every adapter gets a gradient could not be determined: {error}")
        return {}
    return dict(zip(leaves, found, strict=True))


@contextmanager
def _restored(base: Any) -> Iterator[None]:
    """Restore the base's modes and buffers, and the random states, after the `with` block."""
    buffers = [(module, dict(module._buffers)) for module in base.modules()]
    copies = [
        (buffer, buffer.clone()) for buffer in base.buffers() if buffer.numel() <= KEPT_BUFFER and not buffer.is_meta
    ]
    holders: dict[int, Any] = {
        id(each): each for module in base.modules() for each in (module, getattr(module, "config", None))
    }
    # Off meanwhile: checkpointing, and skipping layers at random in training (arXiv 1909.11556).
    off = {"gradient_checkpointing": False, "layerdrop": 0.0}
    attributes = [(each, *item) for each in holders.values() for item in getattr(each, "__dict__", {}).items()]
    before = [(each, name, value) for each, name, value in attributes if name == "training" or name in off]
    for each, name, value in before:
        setattr(each, name, off.get(name, value))
    devices = sorted({parameter.device.index for parameter in base.parameters() if parameter.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they are shown again when the user runs it
            yield
    finally:
        for each, name, value in before:
            setattr(each, name, value)
        for module, held in buffers:
            module._buffers.clear()
            module._buffers.update(held)
        with torch.no_grad():
            for buffer, copied in copies:
                if not torch.equal(buffer, copied):
                    buffer.copy_(copied)
