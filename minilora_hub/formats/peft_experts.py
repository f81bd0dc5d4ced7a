"""LoRA on stacked experts in PEFT's format, where `target_parameters` names parameters instead of modules.

PEFT wraps the module that holds them once for each parameter, in the order in which the module holds them, and names
tensors by the wrappers: of ``gate_up_proj`` and ``down_proj``, the first is inside.

    ours                                       PEFT
    layers.0.mlp.experts.gate_up_proj.lora_A   …layers.0.mlp.experts.base_layer.lora_A.weight
    layers.0.mlp.experts.down_proj.lora_A      …layers.0.mlp.experts.lora_A.weight
    A [experts, r, in]                         [experts * r, in]
    B [experts, out, r]                        [out, r * experts]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.names import PEFT_CONFIG, join_peft
from minilora_hub.errors import AdapterError
from minilora_hub.remote_code.base_structure import ExpertsSite, matches_target
from minilora_hub.remote_code.fused_experts import experts_in

if TYPE_CHECKING:
    import torch


def sites_of(base: Any, parameters: Sequence[str]) -> list[ExpertsSite]:
    """Return the stacked experts that `target_parameters` names as PEFT reads it; names are the base's own paths.

    Raises:
        AdapterError: an entry names anything else.
    """
    sites: list[ExpertsSite] = []
    named: set[str] = set()
    for path, shapes in experts_in(base).items():
        targets = []
        for name, (_, out_features, in_features) in shapes.items():
            found = {each for each in parameters if matches_target(f"{path}.{name}", [each])}
            targets += [(name, out_features, in_features)] * bool(found)
            named |= found
        if targets:
            sites.append(ExpertsSite(path, path, shapes[targets[0][0]][0], tuple(targets)))
    if unknown := sorted(set(parameters) - named):
        raise AdapterError(
            f"{PEFT_CONFIG}: target_parameters={unknown}: the base has no stacked experts of this name; updates of "
            "other parameters are not supported"
        )
    return sites


def peft_modules(site: ExpertsSite, experts: Any) -> Iterator[tuple[str, str]]:
    """Yield (parameter, path of the module that holds PEFT's update of it) for each parameter of a site.

    Args:
        site: the site.
        experts: the base's module, whose order of parameters is PEFT's order of wrapping.
    """
    adapted = {name for name, *_ in site.targets}
    order = [name for name, _ in experts.named_parameters(recurse=False) if name in adapted]
    for place, name in enumerate(reversed(order)):
        yield name, site.path + ".base_layer" * place


def pack(site: ExpertsSite, experts: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a site under PEFT's names and in its shapes.

    Args:
        site: the site.
        experts: the base's module.
        tensors: {name: tensor}, among them ``<name of the site>.<parameter>.lora_A`` and ``.lora_B``.
    """
    packed = {}
    for name, path in peft_modules(site, experts):
        lora_a, lora_b = (tensors[f"{site.name}.{name}.{leaf}"] for leaf in ("lora_A", "lora_B"))
        packed[join_peft(path, "lora_A")] = lora_a.flatten(0, 1)
        packed[join_peft(path, "lora_B")] = lora_b.permute(1, 2, 0).flatten(1)
    return packed


def unpack(lora_a: torch.Tensor, lora_b: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [experts, r, in] and B [experts, out, r] of tensors in PEFT's shapes: the inverse of `pack`."""
    return lora_a.unflatten(0, (experts, -1)), lora_b.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()


def refuse_experts(experts: Any, what: str) -> None:
    """Raise an AdapterError if there are updates of stacked experts, which `what` does not support."""
    if experts:
        raise AdapterError(f"{next(iter(experts))}: {what} does not support updates of a base's stacked experts")
