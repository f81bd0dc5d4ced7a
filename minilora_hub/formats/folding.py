"""Fold an adapter into the tensors of its base's checkpoint as they are read, one at a time.

A LoRA or DoRA on a linear goes into its weight: W + s B A, or c * (W + s B A). The feed-forward block of a MixLoRA
becomes the experts of the base family's own mixture of experts, with their weights written out, as `moe.py` writes them
to disk; here they go to an engine that loads them, and at most one expert's matrix is in memory beside the base's
(a layer's experts where the architecture stacks them).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minilora_hub.errors import AdapterError
from minilora_hub.formats.moe import shared_expert_of_zeros
from minilora_hub.formats.moe_architectures import GRANITE_MOE, QWEN2_MOE, Architecture
from minilora_hub.remote_code.adapted_linear import TINY_NORM
from minilora_hub.remote_code.adapter_files import first_names
from minilora_hub.remote_code.attach import PlannedUpdate, updates_at
from minilora_hub.remote_code.base_structure import ExpertsSite, LinearSite, MixtureSite, Site

Weights = Iterable[tuple[str, Tensor]]


class Folding:
    """An adapter that is going to be folded into its base.

    Args:
        config: its configuration.
        tensors: {canonical name: tensor}, checked against the base.
        sites: where it goes, from `plan_sites`.
        dtype: of the weights that are changed. Those that are not keep the checkpoint's.
        architecture: what a MixLoRA becomes; None for an adapter on linears only.
    """

    def __init__(
        self,
        config: Any,
        tensors: dict[str, Tensor],
        sites: Sequence[Site],
        dtype: torch.dtype,
        architecture: Architecture | None = None,
    ) -> None:
        self.config, self.tensors, self.dtype = config, tensors, dtype
        self.architecture: Any = architecture
        if stacked := [site.path for site in sites if isinstance(site, ExpertsSite)]:
            raise AdapterError(f"{stacked[0]}: an adapter on a base's stacked experts cannot be folded while loading")
        self.mixtures: list[Any] = [site for site in sites if isinstance(site, MixtureSite)]
        self._linears = {
            f"{site.path}.weight": next(updates_at(site, config)) for site in sites if isinstance(site, LinearSite)
        }
        self._blocks: dict[str, tuple[Any, int, PlannedUpdate | None]] = {}
        for site in self.mixtures:
            updates = {update.projection: update for update in updates_at(site, config)}
            for place, name in enumerate((*site.structure.inputs, site.structure.output)):
                self._blocks[f"{site.path}.{name}.weight"] = (site, place, updates.get(name))

    def fold(self, weights: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the base's checkpoint with the adapter in them.

        Raises:
            AdapterError: a weight that the adapter changes is not in the checkpoint, as where it is quantised.
        """
        left = {*self._linears, *self._blocks}
        halves: dict[str, dict[int, Tensor]] = {}
        for name, weight in weights:
            left.discard(name)
            if name in self._linears:
                yield name, self._on_linear(weight, self._linears[name])
            elif name in self._blocks:
                site, place, update = self._blocks[name]
                experts = (self._of_expert(weight, update, expert) for expert in range(self.config.num_experts))
                if self.architecture is GRANITE_MOE:
                    yield from self._stacked(site, place, experts, halves.setdefault(site.path, {}))
                else:
                    template = f"{self._block(site)}.{self.architecture.experts[place]}"
                    yield from ((template.format(number), expert) for number, expert in enumerate(experts))
            else:
                yield name, weight
        if left:
            raise AdapterError(
                f"the base's checkpoint has no {first_names(sorted(left))}, which the adapter changes: it is quantised "
                "or names its tensors in another way"
            )
        for site in self.mixtures:
            router = self.tensors[f"{site.name}.router"]
            yield f"{self._block(site)}.{self.architecture.router}", router.to(self.dtype)
            if self.architecture is QWEN2_MOE:
                zeros = shared_expert_of_zeros(router.shape[1], self.dtype)
                yield from ((f"{self._block(site)}.{name}", tensor) for name, tensor in zeros.items())

    def _block(self, site: Any) -> str:
        """The path of the mixture in the architecture, whose layers are under ``model.layers``."""
        return f"model.{'.'.join(site.name.split('.')[:2])}.{self.architecture.block}"

    def _stacked(
        self, site: Any, place: int, experts: Iterator[Tensor], halves: dict[int, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Granite's experts are one tensor a projection, the gate above up."""
        stack = torch.stack(list(experts))  # (experts, out, in)
        if place == 2:
            yield f"{self._block(site)}.{self.architecture.experts[2]}", stack
            return
        halves[place] = stack
        if len(halves) == 2:
            yield (
                f"{self._block(site)}.{self.architecture.experts[0]}",
                torch.cat([halves.pop(0), halves.pop(1)], dim=1),
            )

    def _on_linear(self, weight: Tensor, update: PlannedUpdate) -> Tensor:
        a, b, m = (self.tensors.get(f"{update.name}.{leaf}") for leaf in ("lora_A", "lora_B", "magnitude"))
        assert a is not None
        assert b is not None
        return adapted_weight(weight, a, b, update.scaling, m).to(self.dtype)

    def _of_expert(self, weight: Tensor, update: PlannedUpdate | None, expert: int) -> Tensor:
        if update is None:  # this projection has no experts: all of them have the base's
            return weight.to(self.dtype)
        a, b = (self.tensors[f"{update.name}.{leaf}"][expert] for leaf in ("lora_A", "lora_B"))
        m = self.tensors.get(f"{update.name}.magnitude")
        return adapted_weight(weight, a, b, update.scaling, None if m is None else m[expert]).to(self.dtype)


@torch.no_grad()
def adapted_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """W + s B A, or m / ||W + s B A|| * (W + s B A) with the norm taken per output row: [out, in], fp32.

    Args:
        weight: W, [out, in].
        lora_a: A, [r, in].
        lora_b: B, [out, r].
        scaling: s.
        magnitude: m, [out]; None for LoRA.
    """
    a, b = (tensor.to(device=weight.device, dtype=torch.float32) for tensor in (lora_a, lora_b))
    whole = torch.addmm(weight.float(), b, a, alpha=scaling)
    if magnitude is None:
        return whole
    norms = torch.linalg.vector_norm(whole, dim=1).clamp_min(TINY_NORM)  # (out)
    return whole.mul_((magnitude.to(norms) / norms)[:, None])
