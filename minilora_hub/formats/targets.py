"""Convert the adapted linears to `target_modules`, in PEFT's format and in ours."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError


def peft_target_names(sites: list[Any], base: Any) -> list[str]:
    """Return the shortest names that PEFT matches to exactly the linears at these sites.

    Args:
        sites: see `remote_code.base_structure`; stacked experts of the base are left out.
        base: the base or its skeleton.
    """
    from minilora_hub.remote_code.base_structure import LinearSite, MixtureSite

    paths = [site.path for site in sites if isinstance(site, LinearSite)]
    paths += [f"{site.path}.{name}" for site in sites if isinstance(site, MixtureSite) for name, *_ in site.targets]
    return shortest_names(paths, base)


def shortest_names(paths: Collection[str], base: Any) -> list[str]:
    """Return the last parts of these paths if no other module of the base has them, else the full paths."""
    names = {path.rpartition(".")[2] for path in paths}
    matched = {path for path, _ in base.named_modules() if path.rpartition(".")[2] in names}
    return sorted(names if matched == set(paths) else paths)


def layer_targets(tensors: Collection[str], base: BaseSource) -> list[str] | str:
    """Return the `target_modules` in our format for the adapted linears.

    Args:
        tensors: canonical names of its tensors, e.g. ``"layers.0.mlp.experts.up_proj.lora_A"``.
        base: the base.

    Raises:
        AdapterError: a linear is adapted only in some layers.
    """
    from minilora_hub.remote_code.base_structure import matches_target
    from minilora_hub.remote_code.layer_stacks import find_decoder_layers, linears_in

    layers = find_decoder_layers(base.skeleton)[1]
    modules = [name.removesuffix(".lora_A").removesuffix(".experts") for name in tensors if name.endswith(".lora_A")]
    adapted = {name.replace(".experts.", ".") for name in modules}
    inner = sorted({name.split(".", 2)[2] for name in adapted})
    for path in inner:
        number = sum(f"layers.{index}.{path}" in adapted for index in range(len(layers)))
        if number != len(layers):
            raise AdapterError(
                f"{path} is adapted in {number} of {len(layers)} layers (layers_to_transform, exclude_modules or a "
                "pattern): our format has the same targets in every layer"
            )
    available = set(linears_in(layers[0]))
    if available == set(inner):
        return "all-linear"
    leaves = sorted({path.rpartition(".")[2] for path in inner})
    return leaves if {path for path in available if matches_target(path, leaves)} == set(inner) else inner
