"""Putting an adapter's modules into a base and taking them out; the canonical names and shapes of its tensors.

Canonical names start at the decoder layers, whatever the base calls them and whether it has a head:
``layers.<i>.<path of a linear>.lora_A``, ``.lora_B``, ``.magnitude`` for LoRA and DoRA, and for a mixture
``layers.<i>.<path of the block>.router`` and ``layers.<i>.<path of the block>.experts.<projection>.lora_A`` and so on,
stacked over the experts.
"""

import torch

from .adapted_linear import AdaptedLinear, LowRankUpdate, init_lora_a, layer_device, row_norms_squared
from .base_structure import LinearSite
from .mixture import MixtureOfLoraExperts
from .routing import routing_of

STACKED = "experts"


def updates_at(site, config):
    """Every low-rank update at a site: (canonical name, projection or None, r, scaling, shape of A, shape of B)."""
    if isinstance(site, LinearSite):
        r, scaling = config.rank_and_scaling(site.name, config.r, config.lora_alpha)
        yield site.name, None, r, scaling, (r, site.in_features), (site.out_features, r)
        return
    experts = config.num_experts
    for projection, out_features, in_features in site.targets:
        r, scaling = config.expert_rank_and_scaling(f"{site.name}.{projection}")
        name = f"{site.name}.{STACKED}.{projection}"
        yield name, projection, r, scaling, (experts, r, in_features), (experts, out_features, r)


def expected_tensors(config, sites):
    """{canonical name: shape} of an adapter with this configuration on these sites."""
    shapes = {}
    for site in sites:
        if not isinstance(site, LinearSite):
            shapes[f"{site.name}.router"] = (config.num_experts, site.hidden_size)
        for name, _, _, _, shape_a, shape_b in updates_at(site, config):
            shapes[f"{name}.lora_A"], shapes[f"{name}.lora_B"] = shape_a, shape_b
            if config.use_dora:
                shapes[f"{name}.magnitude"] = shape_b[:-1]
    return shapes


def attach(base, config, sites, tensors=None, seed=0, dtype=None):
    """Put an adapter into `base`, in place. Everything is built first: a failure leaves the base as it was.

    Args: see `build_modules`.
    """
    for path, module in build_modules(base, config, sites, tensors, seed, dtype).items():
        _replace(base, path, module)


def build_modules(base, config, sites, tensors=None, seed=0, dtype=None):
    """The modules of an adapter, {path in the base: module}, over the base's own, which stay where they are.

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
    modules = {}
    for site in sites:
        build = _linear if isinstance(site, LinearSite) else _mixture
        modules[site.path] = build(base.get_submodule(site.path), site, config, tensors, generator, dtype)
    return modules


def detach(base, sites):
    """Take the adapter out of `base` again."""
    for site in sites:
        module = base.get_submodule(site.path)
        _replace(base, site.path, module.base_layer if isinstance(site, LinearSite) else module.base_block)


def adapter_parameters(base, sites):
    """{canonical name: parameter} of the adapter in `base`."""
    parameters = {}
    for site in sites:
        module = base.get_submodule(site.path)
        if isinstance(site, LinearSite):
            updates = {site.name: module.update}
        else:
            parameters[f"{site.name}.router"] = module.router
            updates = {f"{site.name}.{STACKED}.{name}": update for name, update in module.experts.items()}
        for name, update in updates.items():
            parameters.update((f"{name}.{leaf}", parameter) for leaf, parameter in update.named_parameters())
    return parameters


def _replace(base, path, module):
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _linear(layer, site, config, tensors, generator, dtype):
    (update,) = updates_at(site, config)
    return AdaptedLinear(layer, _update(layer, update, config, tensors, generator, dtype))


def _mixture(block, site, config, tensors, generator, dtype):
    experts = {
        update[1]: _update(block.get_submodule(update[1]), update, config, tensors, generator, dtype)
        for update in updates_at(site, config)
    }
    if tensors is None:
        router = torch.empty(config.num_experts, site.hidden_size, device="cpu", dtype=torch.float32)
        router.normal_(0.0, config.router_init_range, generator=generator)
    else:
        router = tensors[f"{site.name}.router"]
    device = layer_device(block.get_submodule(site.structure.inputs[0]))
    router = router.to(device=device, dtype=dtype or router.dtype)
    noise, dropout = config.router_jitter_noise, config.expert_dropout
    return MixtureOfLoraExperts(block, site.structure, router, experts, routing_of(config), noise, dropout)


def _update(layer, update, config, tensors, generator, dtype):
    name, _, _, scaling, shape_a, shape_b = update
    norms = row_norms_squared(layer) if config.use_dora else None
    magnitude = None
    if tensors is None:
        lora_a, lora_b = init_lora_a(shape_a, generator), torch.zeros(shape_b, device="cpu", dtype=torch.float32)
        if config.use_dora:
            magnitude = norms.sqrt().expand(shape_b[:-1]).clone()
    else:
        lora_a, lora_b = tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"]
        if config.use_dora:
            magnitude = tensors[f"{name}.magnitude"]
    device = layer_device(layer)
    lora_a, lora_b = (tensor.to(device=device, dtype=dtype or tensor.dtype) for tensor in (lora_a, lora_b))
    magnitude = None if magnitude is None else magnitude.to(device)
    return LowRankUpdate(lora_a, lora_b, magnitude, scaling, config.lora_dropout, norms)
