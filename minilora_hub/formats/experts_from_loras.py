"""Combine separately trained LoRA adapters into one MixLoRA, with a fresh router or one that needs no training.

Each adapter becomes one expert with its update of the feed-forward block. Smaller ranks are padded with zeros and
scalings are multiplied into B, neither of which changes the output of an expert. A MixLoRA has only one LoRA on
attention, whereas each adapter has its own. The caller chooses how they are combined:

    same    they must be equal, or none has one (the default: nothing is lost)
    mean    their exact mean: A and B are concatenated, so the ranks add up
    svd     their mean, truncated to the largest rank among them by an SVD
    drop    no adapter on attention

The router is fresh and has to be trained, or Arrow's (arXiv 2405.11157), which needs no training: see `prototype`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional

from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import Combination, combined_update
from minilora_hub.formats.peft_experts import refuse_experts
from minilora_hub.formats.peft_reading import PeftAdapter, Update
from minilora_hub.formats.targets import layer_targets
from minilora_hub.remote_code.base_structure import LinearSite, MixtureSite, plan_sites
from minilora_hub.remote_code.configuration_minilora import MixLoraConfig

OnAttention = Literal["same", "mean", "svd", "drop"]
ON_ATTENTION = ("same", "mean", "svd", "drop")
Router = Literal["fresh", "arrow"]
ROUTERS = ("fresh", "arrow")


def experts_from_loras(
    adapters: Sequence[PeftAdapter],
    *,
    num_experts_per_tok: int = 2,
    attention: OnAttention = "same",
    seed: int = 0,
    router_init_range: float = 0.02,
    router: Router = "fresh",
    temperature: float = 1.0,
) -> tuple[Any, dict[str, torch.Tensor], list[str]]:
    """Make a MixLoRA of LoRA adapters.

    Args:
        adapters: plain LoRA adapters on one base, one per expert, in this order.
        num_experts_per_tok: experts that serve each token.
        attention: how the adapters' updates of attention are combined; see the module's docstring.
        seed: seed of a fresh router's initial weights.
        router_init_range: standard deviation of a fresh router's initial weights.
        router: ``"fresh"``, or ``"arrow"``.
        temperature: Arrow's, by which the similarities are divided before the softmax.

    Returns:
        A MixLoraConfig, ``{canonical name: tensor}``, and notes for the user, one line each.

    Raises:
        AdapterError: the adapters are incompatible; the message gives the reason.
    """
    if attention not in ON_ATTENTION:
        raise AdapterError(f"attention={attention!r}: must be one of {', '.join(ON_ATTENTION)}")
    check_loras(adapters, router)
    base = adapters[0].base
    every = plan_sites(base.skeleton, MixLoraConfig(num_experts=len(adapters)))
    linears = {site.path: site for site in every if isinstance(site, LinearSite)}
    blocks = [site for site in every if isinstance(site, MixtureSite)]
    known = set(linears) | {f"{site.path}.{target[0]}" for site in blocks for target in site.targets}
    for number, adapter in enumerate(adapters):
        outside = sorted(set(adapter.updates) - known)
        if outside:
            raise AdapterError(
                f"adapter {number}: {outside[0]} is outside the decoder layers, which a MixLoRA does not support"
            )
    in_blocks = [update for adapter in adapters for path, update in adapter.updates.items() if path not in linears]
    rank = max((update.lora_a.shape[0] for update in in_blocks), default=1)
    tensors: dict[str, torch.Tensor] = {}
    for site in blocks:
        tensors |= _experts(adapters, site, rank)
    if not tensors:
        raise AdapterError("none of the adapters has an update of the feed-forward block: there are no experts in them")
    on_attention = _on_attention(adapters, linears, attention)
    attention_rank = max((update.lora_a.shape[0] for update in on_attention.values()), default=rank)
    for path, update in on_attention.items():
        name = linears[path].name
        tensors[f"{name}.lora_A"], tensors[f"{name}.lora_B"] = padded_update(update, attention_rank)
    generator = torch.Generator().manual_seed(seed)
    for site in blocks:
        weights = torch.empty(len(adapters), site.hidden_size)
        if router == "arrow":
            weights = torch.stack([_prototype_at(adapter, site) for adapter in adapters])
        else:
            weights.normal_(0.0, router_init_range, generator=generator)
        tensors[f"{site.name}.router"] = weights
    config = MixLoraConfig(
        r=attention_rank,
        lora_alpha=attention_rank,
        expert_r=rank,
        expert_alpha=rank,
        lora_dropout=max(adapter.config["lora_dropout"] for adapter in adapters),
        num_experts=len(adapters),
        num_experts_per_tok=num_experts_per_tok,
        router_init_range=router_init_range,
        target_modules=layer_targets(tensors, base),
        routing_strategy="arrow" if router == "arrow" else "top_k",
        router_temperature=temperature if router == "arrow" else None,
    )
    notes = [] if router == "arrow" else ["the router is fresh: train it before the adapter is used"]
    if attention == "drop" and any(path in linears for adapter in adapters for path in adapter.updates):
        notes.append("the adapters' updates of attention were left out (attention drop)")
    return config, tensors, notes


def check_loras(adapters: Sequence[PeftAdapter], router: Router) -> None:
    """Raise an AdapterError unless there are several adapters, all of them on linears, and `router` is known."""
    if len(adapters) < 2:
        raise AdapterError(f"{len(adapters)} adapter: at least 2 can become the experts of a MixLoRA")
    if router not in ROUTERS:
        raise AdapterError(f"router={router!r}: must be one of {', '.join(ROUTERS)}")
    for adapter in adapters:
        refuse_experts(adapter.experts, "a MixLoRA")


def prototype(updates: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Return the unit vector that updates with one input change most: their top right singular vector, (in).

    Arrow routes every linear by the top right singular vector of B A. A mixture has one router for a block, so the
    updates of its input projections are stacked: M = [B_1 A_1; B_2 A_2]. With A the stacked A_i and A^T = Q R,

        M^T M = A^T C A = Q (R C R^T) Q^T,   C = diag(B_1^T B_1, B_2^T B_2)

    so the vector is Q times the top eigenvector of a small matrix. Its sign means nothing.

    Args:
        updates: A [r, in] and B [out, r] of each projection.
    """
    a = torch.cat([lora_a for lora_a, _ in updates]).double()
    c = torch.block_diag(*(lora_b.double().T @ lora_b.double() for _, lora_b in updates))
    q, r = torch.linalg.qr(a.T)  # (in, n), (n, r of all)
    return (q @ torch.linalg.eigh(r @ c @ r.T).eigenvectors[:, -1]).float()


def _prototype_at(adapter: PeftAdapter, site: Any) -> torch.Tensor:
    found = [adapter.updates.get(f"{site.path}.{name}") for name in site.structure.inputs]
    pairs = [(update.lora_a, update.lora_b * update.scaling) for update in found if update is not None]
    if not any(bool(lora_b.any()) for _, lora_b in pairs):
        raise AdapterError(
            f"router='arrow': an adapter has no update of {' or '.join(site.structure.inputs)} in {site.name}, whose "
            "input Arrow compares: choose router=fresh"
        )
    return prototype(pairs)


def _experts(adapters: Sequence[PeftAdapter], site: Any, rank: int) -> dict[str, torch.Tensor]:
    """Return the stacked tensors of one block, with zeros where an adapter does not update a projection."""
    tensors = {}
    for name, out_features, in_features in site.targets:
        found = [adapter.updates.get(f"{site.path}.{name}") for adapter in adapters]
        dtypes = [update.lora_a.dtype for update in found if update is not None]
        if not dtypes:
            continue
        nothing = Update(torch.zeros(rank, in_features), torch.zeros(out_features, rank), 1.0)
        parts = [padded_update(update or nothing, rank) for update in found]
        tensors[f"{site.name}.experts.{name}.lora_A"] = torch.stack([a.to(dtypes[0]) for a, _ in parts])
        tensors[f"{site.name}.experts.{name}.lora_B"] = torch.stack([b.to(dtypes[0]) for _, b in parts])
    return tensors


def _on_attention(adapters: Sequence[PeftAdapter], linears: dict[str, Any], choice: OnAttention) -> dict[str, Update]:
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
    return updates


def padded_update(update: Update, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B with zeros up to `rank`, and the scaling multiplied into B."""
    missing = rank - update.lora_a.shape[0]
    lora_b = update.lora_b if update.scaling == 1 else (update.lora_b.float() * update.scaling).to(update.lora_b.dtype)
    return functional.pad(update.lora_a, (0, 0, 0, missing)), functional.pad(lora_b, (0, missing))
