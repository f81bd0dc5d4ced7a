"""Combine separately trained LoRA adapters under routers of their own: each adapted linear chooses among them.

`experts_from_loras` routes the feed-forward block and has one LoRA on attention for all experts. Here every linear that
an adapter updates gets a router over the adapters' updates of it (MoLoRA), so attention is routed, too, and nothing is
averaged. Smaller ranks are padded with zeros and scalings are multiplied into B, which changes no output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from minilora_hub.errors import AdapterError
from minilora_hub.formats.experts_from_loras import Router, check_loras, padded_update, prototype
from minilora_hub.formats.peft_reading import PeftAdapter, Update
from minilora_hub.formats.targets import layer_targets
from minilora_hub.remote_code.base_structure import LinearSite, plan_sites
from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig


def whole_adapters(
    adapters: Sequence[PeftAdapter],
    *,
    num_experts_per_tok: int = 2,
    seed: int = 0,
    router_init_range: float = 0.02,
    router: Router = "fresh",
    temperature: float = 1.0,
) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Make a MixLoRA whose linears are routed of LoRA adapters.

    Args: see `experts_from_loras`.

    Returns:
        A MixLoraConfig, ``{canonical name: tensor}``, and notes for the user, one line each.

    Raises:
        AdapterError: the adapters are incompatible; the message gives the reason.
    """
    check_loras(adapters, router)
    base = adapters[0].base
    sites = {site.path: site for site in plan_sites(base.skeleton, DoraConfig()) if isinstance(site, LinearSite)}
    for number, adapter in enumerate(adapters):
        if outside := sorted(adapter.updates.keys() - sites.keys()):
            raise AdapterError(f"adapter {number}: {outside[0]} is outside the decoder layers, which are routed")
    rank = max(update.lora_a.shape[0] for adapter in adapters for update in adapter.updates.values())
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for path, site in sites.items():
        found = [adapter.updates.get(path) for adapter in adapters]
        dtypes = [update.lora_a.dtype for update in found if update is not None]
        if not dtypes:
            continue
        nothing = Update(torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank), 1.0)
        parts = [padded_update(update or nothing, rank) for update in found]
        tensors[f"{site.name}.experts.lora_A"] = torch.stack([a.to(dtypes[0]) for a, _ in parts])
        tensors[f"{site.name}.experts.lora_B"] = torch.stack([b.to(dtypes[0]) for _, b in parts])
        if router == "fresh":
            weights = torch.empty(len(adapters), site.in_features).normal_(0.0, router_init_range, generator=generator)
        elif all(bool(lora_b.any()) for _, lora_b in parts):
            weights = torch.stack([prototype([pair]) for pair in parts])
        else:
            raise AdapterError(
                f"router='arrow': an adapter has no update of {site.name}, whose input Arrow compares: choose "
                "router=fresh"
            )
        tensors[f"{site.name}.router"] = weights
    config = MixLoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=max(adapter.config["lora_dropout"] for adapter in adapters),
        num_experts=len(adapters),
        num_experts_per_tok=num_experts_per_tok,
        router_init_range=router_init_range,
        target_modules=layer_targets(tensors, base),
        router_scope="linear",
        routing_strategy="arrow" if router == "arrow" else "top_k",
        router_temperature=temperature if router == "arrow" else None,
    )
    return (
        config,
        tensors,
        [] if router == "arrow" else ["the routers are fresh: train them before the adapter is used"],
    )
