"""LoRA and DoRA on a base's own experts, whose weights are stacked parameters (Mixtral, Qwen3-MoE, GPT-OSS, …).

    y = c_e * (W_e x + s B_e A_e x) + b_e,   c_e = m_e / ||W_e + s B_e A_e||, the norm taken per expert and output row

The base's router chooses the experts e. B_e A_e is never formed: see `adapted_linear.py`. Names are as in PEFT's
`target_parameters`, e.g. ``mlp.experts.down_proj``.
"""

from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted_linear import LowRankUpdate, product_dtype
from .device_slots import SlotsGathered
from .expert_slots import Slots, SlotsByExpert
from .linear_layers import is_split


class ExpertsLinear:
    """One stacked parameter as a layer of all experts, without its bias: (experts, …, in) -> (experts, …, out)."""

    def __init__(self, experts: Any, name: str) -> None:
        self.experts, self.name = experts, name

    @property
    def weight(self) -> Tensor:
        """W, [experts, out, in]."""
        weight = getattr(self.experts, self.name)
        return weight.mT if self.experts.is_transposed else weight

    def parameters(self) -> Iterator[Tensor]:
        return iter((self.weight,))

    def __call__(self, rows: Tensor) -> Tensor:
        return rows @ self.weight.mT

    def of_slots(self, x: Tensor, slots: Slots) -> Tensor:
        """W_e x of each slot: (slots, in) -> (slots, out)."""
        weight = self.weight
        if isinstance(slots, SlotsByExpert):
            blocks = zip(x.split_with_sizes(slots.counts), slots.experts, strict=True)
            return torch.cat([F.linear(rows, weight[expert]) for rows, expert in blocks])
        return torch.bmm(weight[slots.expert], x.unsqueeze(-1)).squeeze(-1)


def projections(experts: Any) -> tuple[str, str]:
    """Return the names of the stacked parameters: the input projection's and the output projection's."""
    return ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")


def experts_in(layer: nn.Module) -> dict[str, dict[str, tuple[int, int, int]]]:
    """{path in the layer: {parameter: (experts, out, in)}} of the stacked experts in a layer that can be adapted."""
    return {
        path: {name: cast(Any, ExpertsLinear(module, name).weight.shape) for name in projections(module)}
        for path, module in layer.named_modules()
        if _is_known(module)
    }


def _is_known(module: Any) -> bool:
    # transformers' `use_experts_implementation` sets these, and lays down what such a module computes.
    decorated = all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias"))
    if not decorated or getattr(module, "_is_expert_parallel", False):
        return False
    offloaded = getattr(getattr(module, "_hf_hook", None), "offload", False)
    weights: list[Any] = [getattr(module, name, None) for name in projections(module)]
    plain = all((type(w) is nn.Parameter or is_split(w)) and w.dim() == 3 and w.is_floating_point() for w in weights)
    return plain and all(w.itemsize > 1 for w in weights) and not offloaded


class AdaptedExperts(nn.Module):
    """Stacked experts of the base with LoRA or DoRA updates: {name of a parameter: its stacked `LowRankUpdate`}."""

    def __init__(self, base_layer: Any, updates: dict[str, LowRankUpdate]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.updates = nn.ModuleDict(dict(updates))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, d), with the experts of each token and their weights, (tokens, K), as the base's own."""
        experts, x = self.base_layer, hidden_states.flatten(0, -2)
        slots: Any = (SlotsGathered if torch.compiler.is_compiling() else SlotsByExpert)(top_k_index)
        first, last = projections(experts)
        hidden = self._project(first, slots.of_tokens(x), slots)  # (slots, ff or twice that)
        hidden = experts._apply_gate(hidden) if experts.has_gate else experts.act_fn(hidden)
        out = self._project(last, hidden, slots)  # (slots, d)
        if getattr(experts, "has_post_expert_norm", False):
            out = experts.post_expert_norm(out)
        return slots.sum_slots(out * slots.of_slots(top_k_weights)).to(x.dtype).view_as(hidden_states)

    def _project(self, name: str, x: Tensor, slots: Any) -> Tensor:
        layer = ExpertsLinear(self.base_layer, name)
        out = layer.of_slots(x, slots)
        if name in self.updates:
            update: Any = self.updates[name]
            low = slots.project_down(update.dropout(x).to(product_dtype(out, x, update.lora_A)), update)
            out = slots.add_projected_up(out, low, update)
            if update.magnitude is not None:
                out = out * update.scale(layer)[slots.expert].to(out.dtype)
        return out + getattr(self.base_layer, f"{name}_bias")[slots.expert] if self.base_layer.has_bias else out

    @torch.no_grad()
    def merged_weights(self) -> dict[str, Tensor]:
        """{name of a parameter: c * (W + s B A), in its dtype and layout}."""
        merged, items = {}, cast(Iterable[tuple[str, Any]], self.updates.items())
        for name, update in items:
            layer, a, b = ExpertsLinear(self.base_layer, name), update.lora_A.float(), update.lora_B.float()
            weight = torch.baddbmm(layer.weight.float(), b, a, alpha=update.scaling)
            if update.magnitude is not None:
                weight *= update.scale(layer)[..., None]
            held = getattr(self.base_layer, name)
            merged[name] = (weight.mT if self.base_layer.is_transposed else weight).to(held.dtype)
        return merged
