"""Combine several LoRA adapters on one base into one, with PEFT's own functions.

    linear, ties, dare_linear, dare_ties, magnitude_prune     on A and B separately, as in PEFT: fast and approximate;
                                                              all ranks must be equal
    svd, ties_svd, dare_linear_svd, dare_ties_svd,
    magnitude_prune_svd                                       on the whole updates s B A, truncated to a rank by an SVD
    cat                                                       A and B concatenated: the exact sum; the ranks add up

These are the functions that `LoraModel.add_weighted_adapter` uses. They are called on the tensors directly, so that the
base's weights are not needed, and because that method keeps the first adapter's `use_rslora` while it sets alpha to the
rank, which scales the result by sqrt(r) (PEFT 0.21.2).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import merge_utils

from minilora_hub.adapter_folder.companions import common_source
from minilora_hub.adapter_folder.folders import AdapterFolder, naming, read_folder
from minilora_hub.adapter_folder.reading import notes_on_base
from minilora_hub.bases.skeleton import BaseSource, find_base, require_use_of
from minilora_hub.errors import AdapterError
from minilora_hub.formats.averaging import truncated_product
from minilora_hub.formats.peft_conversion import write_normalised
from minilora_hub.formats.peft_experts import refuse_experts
from minilora_hub.formats.peft_reading import PeftAdapter, Update, read_peft
from minilora_hub.seeds import require_seed
from minilora_hub.whole_folders import whole_folder

ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
METHODS = (*ON_FACTORS, "svd", *(f"{name}_svd" for name in ON_FACTORS[1:]), "cat")
WITHOUT_PRUNING = ("linear", "svd", "cat")


@dataclass(frozen=True)
class Combination:
    """How adapters are combined.

    Attributes:
        method: one of `METHODS`.
        weights: a factor for each adapter.
        density: the share of values that pruning keeps, above 0 and below 1.
        rank: of the result, for the methods with an SVD; None for the largest rank among the adapters.
        seed: of DARE's random pruning.
    """

    method: str
    weights: tuple[float, ...]
    density: float = 0.5
    rank: int | None = None
    seed: int = 0

    def check(self, count: int) -> None:
        """Raise AdapterError or ValueError if a field is out of range for this number of adapters."""
        if self.method not in METHODS:
            raise AdapterError(f"method={self.method!r}: must be one of {', '.join(METHODS)}")
        if count < 2:
            raise AdapterError(f"{count} adapter: at least 2 can be combined")
        if len(self.weights) != count or not all(math.isfinite(weight) for weight in self.weights):
            raise AdapterError(f"weights={list(self.weights)}: must be one finite number for each of {count} adapters")
        if not 0 < self.density < 1:
            raise AdapterError(f"density={self.density}: must be above 0 and below 1")
        if self.rank is not None and (self.rank < 1 or not self.method.endswith("svd")):
            raise AdapterError(f"rank={self.rank}: must be at least 1, and only methods with svd take it")
        require_seed(self.seed)


def combine(
    sources: Sequence[str | Path],
    out: str | Path,
    combination: Combination,
    *,
    base: str | None = None,
    base_revision: str | None = None,
) -> list[str]:
    """Combine LoRA adapters into a new one, in PEFT's format.

    Args:
        sources: folders of LoRA adapters in PEFT's format.
        out: an empty folder, or one that does not exist.
        combination: how they are combined.
        base: the base. Default: the one that the adapters name.
        base_revision: its revision on the Hub.

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: an adapter is not a LoRA, or the adapters are incompatible. Nothing is written then.
    """
    combination.check(len(sources))
    adapters = read_loras(sources, base, base_revision)
    notes = notes_on_base(adapters[0].base, *map(read_folder, sources))
    with whole_folder(out) as folder:
        source = common_source([Path(one) for one in sources])
        return notes + write_normalised(folder, combined(adapters, combination), source)


def read_loras(sources: Sequence[str | Path], base: str | None, base_revision: str | None) -> list[PeftAdapter]:
    """Read LoRA adapters that belong to one base.

    Raises:
        AdapterError: an adapter is not a plain LoRA, or names a different base than the first; or the base has no
            revisions.
    """
    found = [read_folder(source) for source in sources]
    for adapter in found:
        _refuse_other_methods(adapter)
    names = sorted({adapter.base for adapter in found if adapter.base})
    if base is None and len(names) > 1:
        raise AdapterError(f"the adapters name {len(names)} bases, {names[0]!r} and {names[1]!r}: pass base= (--base)")
    shared = find_base(base or (names[0] if names else None), base_revision)
    require_use_of(base_revision, shared)
    adapters = []
    for adapter in found:
        with naming(adapter.folder.name):
            adapters.append(read_peft(adapter, shared))
            refuse_experts(adapters[-1].experts, "combining")
    return adapters


def combined(adapters: Sequence[PeftAdapter], combination: Combination) -> PeftAdapter:
    """Return the combination of adapters on one base; see `combine`."""
    base: BaseSource = adapters[0].base
    rank = result_rank(adapters, combination)
    updates = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(combination.seed)
        for path in sorted({path for adapter in adapters for path in adapter.updates}):
            pairs = [
                (adapter.updates[path], weight)
                for adapter, weight in zip(adapters, combination.weights, strict=True)
                if path in adapter.updates and weight != 0
            ]
            lora_a, lora_b = combined_update(pairs, combination, rank) if pairs else _nothing(adapters, path, rank)
            updates[path] = Update(lora_a.contiguous(), lora_b.contiguous(), 1.0)
    first = adapters[0].config
    ranks = {path: update.lora_a.shape[0] for path, update in updates.items()}
    # `rank` is an upper bound: a linear may be smaller, and `cat` adds up only the ranks of the adapters that it has.
    [(rank, _)] = Counter(sorted(ranks.values(), reverse=True)).most_common(1)
    config = first | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: r for path, r in ranks.items() if r != rank},
        "lora_dropout": max(adapter.config["lora_dropout"] for adapter in adapters),
    }
    return replace(adapters[0], config=config, updates=updates, base=base)


def result_rank(adapters: Sequence[PeftAdapter], combination: Combination) -> int:
    """Return the rank of the combination.

    Raises:
        AdapterError: the ranks differ, and the method works on A and B separately.
    """
    ranks = [max(update.lora_a.shape[0] for update in adapter.updates.values()) for adapter in adapters]
    if combination.method == "cat":
        return sum(ranks)
    if combination.method.endswith("svd"):
        return combination.rank or max(ranks)
    every = {update.lora_a.shape[0] for adapter in adapters for update in adapter.updates.values()}
    if len(every) > 1:
        raise AdapterError(
            f"method={combination.method!r}: the adapters' ranks must be the same, got {sorted(every)}; "
            "svd, its variants and cat accept any"
        )
    return ranks[0]


def combined_update(
    pairs: Sequence[tuple[Update, float]], combination: Combination, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine updates of one linear.

    Args:
        pairs: (update, weight) of each adapter that adapts this linear.
        combination: how they are combined.
        rank: of the result; smaller where a linear has fewer rows or columns.

    Returns:
        A [r, in] and B [out, r], whose product is the update: their scaling is one.
    """
    method = combination.method
    factors = [weight * update.scaling for update, weight in pairs]
    dtype = pairs[0][0].lora_a.dtype
    all_a = [update.lora_a.float() for update, _ in pairs]
    all_b = [update.lora_b.float() for update, _ in pairs]
    if method == "cat":
        scaled = [factor * a for factor, a in zip(factors, all_a, strict=True)]
        return torch.cat(scaled).to(dtype), torch.cat(all_b, dim=1).to(dtype)
    if method in ON_FACTORS:
        # A and B are each scaled by the square root of the factor, and only A by its sign, which would cancel out.
        roots = torch.tensor([math.sqrt(abs(factor)) for factor in factors])
        signs = torch.tensor([math.copysign(1.0, factor) for factor in factors])
        lora_a = _merge(method, all_a, roots * signs, combination.density)
        lora_b = _merge(method, all_b, roots, combination.density)
        return lora_a.to(dtype), lora_b.to(dtype)
    if method == "svd":
        scaled = [factor * b.double() for factor, b in zip(factors, all_b, strict=True)]
        lora_a, lora_b, _ = truncated_product(scaled, [a.double() for a in all_a], rank)
        return lora_a.to(dtype), lora_b.to(dtype)
    # Each update includes its scaling, so that magnitudes are compared after scaling.
    deltas = [update.scaling * (b @ a) for (update, _), a, b in zip(pairs, all_a, all_b, strict=True)]
    weights = torch.tensor([weight for _, weight in pairs])
    delta = _merge(method.removesuffix("_svd"), deltas, weights, combination.density)
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    rank = min(rank, s.shape[0])
    return vh[:rank].to(dtype), (u[:, :rank] * s[:rank]).to(dtype)


def _merge(method: str, tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    if method == "linear":
        return merge_utils.task_arithmetic(tensors, weights)
    merge: Any = getattr(merge_utils, method)
    merged: torch.Tensor = merge(tensors, weights, density)
    return merged


def _nothing(adapters: Sequence[PeftAdapter], path: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an update of zeros, for a linear whose adapters all have the weight 0."""
    one = next(adapter.updates[path] for adapter in adapters if path in adapter.updates)
    lora_a, lora_b = one.lora_a, one.lora_b
    rank = min(rank, lora_a.shape[1], lora_b.shape[0])
    return torch.zeros(rank, lora_a.shape[1], dtype=lora_a.dtype), torch.zeros(
        lora_b.shape[0], rank, dtype=lora_b.dtype
    )


def _refuse_other_methods(adapter: AdapterFolder) -> None:
    name = adapter.folder.name
    if adapter.method == "mixlora":
        raise AdapterError(
            f"adapter {name!r} is a MixLoRA, whose experts do not match those of another: only LoRA adapters can be "
            "combined; `minilora experts` adds and drops experts"
        )
    if adapter.method != "lora" or adapter.dialect != "peft":
        raise AdapterError(
            f"adapter {name!r} is a {adapter.method} in the format {adapter.dialect!r}: only LoRA in PEFT's format "
            "can be combined; PEFT's functions ignore DoRA's magnitudes"
        )
