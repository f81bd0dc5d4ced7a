"""Separately trained LoRA adapters as the experts of one MixLoRA, with a fresh router that is yet to be trained.

Each adapter becomes one expert, with its update of the feed-forward block as it is: ranks that differ are filled up
with zeros, and scalings that differ go into B, neither of which changes what an expert computes. A MixLoRA has one
LoRA on attention, though, and the adapters have one each. What becomes of those is the caller's decision:

    same    they must be equal, or there is none (the default: nothing is lost)
    mean    their mean, exactly: A and B side by side, so the rank is the sum of theirs
    svd     their mean cut back to the largest rank among them by an SVD
    drop    no adapter on attention
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import Combination, combined_update
from minilora_hub.formats.peft_reading import PeftAdapter, Update

if TYPE_CHECKING:
    import torch

OnAttention = Literal["same", "mean", "svd", "drop"]
ON_ATTENTION = ("same", "mean", "svd", "drop")


def experts_from_loras(
    adapters: Sequence[PeftAdapter],
    *,
    num_experts_per_tok: int = 2,
    attention: OnAttention = "same",
    seed: int = 0,
    router_init_range: float = 0.02,
) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Make a MixLoRA of LoRA adapters.

    Args:
        adapters: plain LoRA adapters on one base, one an expert, in this order.
        num_experts_per_tok: experts that serve each token.
        attention: what becomes of the adapters' updates outside the feed-forward block: see the head of this file.
        seed: of the router.
        router_init_range: standard deviation of the router.

    Returns:
        A MixLoraConfig, ``{canonical name: tensor}``, and what the user should know, a line each.

    Raises:
        AdapterError: the adapters do not fit together; the message says in what.
    """
    from minilora_hub.remote_code.base_structure import LinearSite, plan_sites
    from minilora_hub.remote_code.configuration_minilora import MixLoraConfig

    if len(adapters) < 2:
        raise AdapterError(f"{len(adapters)} adapter: at least 2 can become the experts of a MixLoRA")
    if attention not in ON_ATTENTION:
        raise AdapterError(f"attention={attention!r}: must be one of {', '.join(ON_ATTENTION)}")
    base = adapters[0].base
    every = plan_sites(base.skeleton, MixLoraConfig(num_experts=len(adapters)))
    linears = {site.path: site for site in every if isinstance(site, LinearSite)}
    blocks = [site for site in every if not isinstance(site, LinearSite)]
    known = set(linears) | {f"{site.path}.{target[0]}" for site in blocks for target in site.targets}
    for number, adapter in enumerate(adapters):
        outside = sorted(set(adapter.updates) - known)
        if outside:
            raise AdapterError(f"adapter {number}: {outside[0]} is outside the decoder layers: a MixLoRA has no place")
    in_blocks = [update for adapter in adapters for path, update in adapter.updates.items() if path not in linears]
    rank = max((update.lora_a.shape[0] for update in in_blocks), default=1)
    tensors = _experts(adapters, blocks, rank)
    targets = {site.path.rpartition(".")[2] + f".{name}" for site in blocks for name in _targets(adapters, site)}
    if not targets:
        raise AdapterError("none of the adapters has an update of the feed-forward block: there are no experts in them")
    on_attention = _on_attention(adapters, linears, attention)
    attention_rank = max((update.lora_a.shape[0] for update in on_attention.values()), default=rank)
    for path, update in on_attention.items():
        lora_a, lora_b = _filled(update, attention_rank)
        tensors[f"{linears[path].name}.lora_A"], tensors[f"{linears[path].name}.lora_B"] = lora_a, lora_b
    targets |= {_in_layer(linears[path].name) for path in on_attention}
    tensors |= _routers(blocks, len(adapters), seed, router_init_range)
    config = MixLoraConfig(
        r=attention_rank,
        lora_alpha=attention_rank,
        expert_r=rank,
        expert_alpha=rank,
        lora_dropout=max(adapter.config["lora_dropout"] for adapter in adapters),
        num_experts=len(adapters),
        num_experts_per_tok=num_experts_per_tok,
        router_init_range=router_init_range,
        target_modules=sorted(targets),
    )
    notes = ["the router is fresh: train it before the adapter is used"]
    if attention == "drop" and any(path in linears for adapter in adapters for path in adapter.updates):
        notes.append("the adapters' updates of attention were left out (attention drop)")
    return config, tensors, notes


def _targets(adapters: Sequence[PeftAdapter], site: Any) -> list[str]:
    names = [target[0] for target in site.targets]
    return [name for name in names if any(f"{site.path}.{name}" in adapter.updates for adapter in adapters)]


def _experts(adapters: Sequence[PeftAdapter], blocks: list[Any], rank: int) -> dict[str, torch.Tensor]:
    """The stacked tensors of every block; an adapter without an update somewhere is an expert of zeros there."""
    import torch

    in_first = _targets(adapters, blocks[0])
    tensors = {}
    for site in blocks:
        if _targets(adapters, site) != in_first:
            raise AdapterError(
                f"{site.path}: the adapters update {_targets(adapters, site) or 'nothing'} there, {in_first} in the "
                "first layer: a MixLoRA has the same targets in every layer"
            )
        shapes = {name: (out_features, in_features) for name, out_features, in_features in site.targets}
        for name in in_first:
            found = [adapter.updates.get(f"{site.path}.{name}") for adapter in adapters]
            dtype = next(update.lora_a.dtype for update in found if update is not None)
            parts = [_filled(update, rank) if update else _zeros(shapes[name], rank) for update in found]
            tensors[f"{site.name}.experts.{name}.lora_A"] = torch.stack([a.to(dtype) for a, _ in parts])
            tensors[f"{site.name}.experts.{name}.lora_B"] = torch.stack([b.to(dtype) for _, b in parts])
    return tensors


def _on_attention(adapters: Sequence[PeftAdapter], linears: dict[str, Any], choice: OnAttention) -> dict[str, Update]:
    import torch

    if choice == "drop":
        return {}
    updates = {}
    count = len(adapters)
    for path in sorted({path for adapter in adapters for path in adapter.updates if path in linears}):
        found = [adapter.updates[path] for adapter in adapters if path in adapter.updates]
        first = found[0]
        same = len(found) == count and all(
            update.scaling == first.scaling
            and torch.equal(update.lora_a, first.lora_a)
            and torch.equal(update.lora_b, first.lora_b)
            for update in found
        )
        if same:
            updates[path] = first
        elif choice == "same":
            raise AdapterError(
                f"{path}: the adapters' updates differ, and a MixLoRA has one for all experts: choose attention= "
                "(--attention) mean, svd or drop"
            )
        else:
            how = Combination("cat" if choice == "mean" else "svd", (1 / count,) * count)
            rank = max(update.lora_a.shape[0] for update in found)
            lora_a, lora_b = combined_update([(update, 1 / count) for update in found], how, rank)
            updates[path] = Update(lora_a, lora_b, 1.0)
    in_first = {_in_layer(linears[path].name) for path in updates if linears[path].name.startswith("layers.0.")}
    every = {_in_layer(site.name) for site in linears.values()}
    wrong = [site.path for site in linears.values() if (site.path in updates) != (_in_layer(site.name) in in_first)]
    if wrong and every:
        raise AdapterError(f"{wrong[0]}: adapted in some layers only: a MixLoRA has the same targets in every layer")
    return updates


def _filled(update: Update, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B with zeros up to `rank`, and the scaling in B."""
    from torch.nn import functional

    missing = rank - update.lora_a.shape[0]
    lora_b = update.lora_b if update.scaling == 1 else (update.lora_b.float() * update.scaling).to(update.lora_b.dtype)
    return functional.pad(update.lora_a, (0, 0, 0, missing)), functional.pad(lora_b, (0, missing))


def _zeros(shape: tuple[int, int], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)


def _routers(blocks: list[Any], count: int, seed: int, spread: float) -> dict[str, torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return {
        f"{site.name}.router": torch.empty(count, site.hidden_size).normal_(0.0, spread, generator=generator)
        for site in blocks
    }


def _in_layer(name: str) -> str:
    """``layers.3.self_attn.q_proj`` -> ``self_attn.q_proj``."""
    return name.split(".", 2)[2]
