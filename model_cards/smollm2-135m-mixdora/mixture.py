"""MixLoRA's feed-forward block: a router, and LoRA experts over the one frozen block they share (arXiv 2404.15159).

For a token x with experts e_1 .. e_K and weights g_1 .. g_K, which `routing.py` decides (eq. 4 to 6 of the paper):

    y = sum_k g_k * E_{e_k}(x),   E_e(x) = W_down' act(W_gate' x) * (W_up' x),   W' = W + s B_e A_e

How this differs from the reference: W_gate x and W_up x are the same for every expert, and W_down is linear, so

    sum_k g_k W_down h_k = W_down sum_k g_k h_k

and every base matrix multiplication runs once per token, as in the dense model; an expert adds its low-rank parts only.
With DoRA experts (`use_dora`) the per-expert output scale keeps W_down from being combined: there it runs once per
slot.

A slot is one (token, chosen expert) pair; `expert_slots.py` arranges them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapted_linear import LowRankUpdate, apply_dora_scale, product_dtype
from .device_slots import SlotsGathered, SlotsGrouped, SlotsOfTraining
from .expert_slots import Slots, SlotsByExpert, SlotsMasked, SlotsOfOneToken
from .feed_forward import FeedForwardStructure
from .linear_layers import is_only_its_product, only_product_of
from .routed_linear import RoutedModule
from .routing import Routing
from .routing_record import Routes


class Routed(NamedTuple):
    """Tokens between the input and the output projections of a mixture.

    Attributes:
        hidden: what the output projection is called with: (tokens, ff), or (slots, ff) where DoRA scales each slot.
        x: the block's input, (tokens, d).
        routes: `Routes` of the tokens.
        slots: how the slots are arranged.
        low: A of the output projection applied to each slot, (slots, r), in the form of `slots`; None where no expert
            is on it.
    """

    hidden: Tensor
    x: Tensor
    routes: Routes
    slots: Slots
    low: Any


class MixtureOfLoraExperts(RoutedModule):
    """A feed-forward block of the base with a router and LoRA experts over it: (batch, seq, d) -> (batch, seq, d).

    Args:
        base_block: the base's feed-forward module; its linears are called, never unpacked.
        structure: its `FeedForwardStructure`.
        router: router weight, [experts, d].
        experts: projection name -> `LowRankUpdate` stacked over the experts. A projection may be left out.
        routing: which experts serve which token.
        jitter_noise: see `RoutedModule`.
        dropout: probability with which values of the block's output are dropped in training.
        layer: see `RoutedModule`.
    """

    def __init__(
        self,
        base_block: nn.Module,
        structure: FeedForwardStructure,
        router: Tensor,
        experts: dict[str, LowRankUpdate],
        routing: Routing,
        jitter_noise: float = 0.0,
        dropout: float = 0.0,
        layer: str = "",
    ) -> None:
        super().__init__()
        self.base_block = base_block
        self.structure = structure
        self.set_router(router, routing, jitter_noise, layer)
        self.experts = nn.ModuleDict(dict(experts))
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states.flatten(0, -2)  # (tokens, d)
        # One base GEMM per projection, whatever the number of experts.
        shared = [self._project(name, x) for name in self.structure.inputs]  # each (tokens, out)
        routed = self.expand(x, shared, hidden_states.shape[:-1])
        out = self.combine(self._project(self.structure.output, routed.hidden), routed)  # (tokens, d)
        if self.training:
            out = self.structure.dropout(self.dropout(out))
        return out.view_as(hidden_states)

    def expand(self, x: Tensor, shared: Sequence[Tensor], leading_shape: Sequence[int]) -> Routed:
        """Compute everything before the output projection, which the caller applies to `hidden`; see `combine`.

        Args:
            x: the block's input, (tokens, d).
            shared: the outputs of the base's input projections, each (tokens, out).
            leading_shape: see `TopKRouting.route`.
        """
        routes = self.route(x, leading_shape)
        slots = self._arrange(routes, shared[0].dtype)
        update = self._update_of(self.structure.output)
        slotwise = update is not None and update.magnitude is not None
        hidden: list[Tensor] = []
        low: list[Any] = []
        for part in slots.parts():
            h = self.structure.activate(*self._expert_inputs(shared, x, part))  # (slots, ff)
            g = part.of_slots(routes.weights).to(x.dtype)
            if isinstance(part, SlotsOfTraining) and not slotwise:  # keeps h for the backward pass, not g_k h_k too
                low += [] if update is None else [self._project_down(update, h, part) * g]
                hidden = [part.sum_weighted(h, routes.weights)]
                continue
            h = h * g if torch.is_grad_enabled() else h.mul_(g)  # g_k h_k
            if update is not None:
                low.append(self._project_down(update, h, part))  # (slots, r)
            hidden = [*hidden, h] if slotwise else [part.sum_slots(h, *hidden)]
        whole = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
        blocks = low[0] if len(low) == 1 else [block for part in low for block in part]
        return Routed(whole, x, routes, slots, blocks)

    def combine(self, projected: Tensor, routed: Routed) -> Tensor:
        """Return the block's output, (tokens, d), from the output projection of `routed.hidden`, with its bias.

        Where no gradient needs it, `projected` is written to.
        """
        slots = routed.slots
        update = self._update_of(self.structure.output)
        if update is None:
            out = projected
        elif update.magnitude is None:
            out = slots.add_to_tokens(projected, routed.low, update)
        else:  # g * (c * (W h + s B A h) + b): the bias is left out of every slot and added once
            bias = self._output_bias()
            out = projected if bias is None else projected - bias
            out = slots.add_projected_up(out, routed.low, update)
            out = slots.sum_slots(self._scaled(self.structure.output, out, slots, with_bias=False))
            out = out if bias is None else out + bias
        if not self.routing.weights_sum_to_one:
            out = self._weigh_bias(out, routed.routes.weights)
        if routed.routes.passed is not None:
            out = out + (routed.routes.passed * routed.x).to(out.dtype)
        return out

    def _arrange(self, routes: Routes, dtype: torch.dtype) -> Slots:
        """Choose the arrangement of the slots; see `expert_slots.py`."""
        experts: Any = self._modules["experts"]
        selected, num_experts, updates = routes.selected, self.router.shape[0], experts._modules.values()
        many = selected.numel() > num_experts
        if selected.device.type == "cpu" and not torch.compiler.is_compiling():
            if selected.shape[0] == 1:
                return SlotsOfOneToken(selected, routes.kept)
            if many and routes.kept is None and SlotsMasked.can(updates):
                return SlotsMasked(selected, num_experts)
            trains = torch.is_grad_enabled() and dtype == torch.float32
            if many and routes.kept is None and trains and SlotsOfTraining.can(updates):
                return SlotsOfTraining(selected, num_experts)
            return SlotsByExpert(selected, routes.kept)
        if many and selected.device.type != "cpu" and SlotsGrouped.can(updates):
            return SlotsGrouped(selected, num_experts)
        if many and not torch.compiler.is_compiling():
            return SlotsByExpert(selected, routes.kept)
        return SlotsGathered(selected)

    def _project(self, name: str, x: Tensor) -> Tensor:
        layer = self._layer(name)
        if not self.training and is_only_its_product(layer):
            return only_product_of(layer, x)
        return layer(x)

    def _layer(self, name: str) -> nn.Module:
        return self.base_block._modules.get(name) or self.base_block.get_submodule(name)

    def _expert_inputs(self, shared: Sequence[Tensor], x: Tensor, slots: Slots) -> list[Tensor]:
        """The input projections of every slot, each (slots, out): shared W x + b, and the update of its expert."""
        updates = {name: self._update_of(name) for name in self.structure.inputs}
        given = {name: update for name, update in updates.items() if update is not None}
        hidden: dict[str, Any] = {}
        if self.training and any(update.dropout.p > 0 for update in given.values()):  # each drops its own input
            x = slots.of_tokens(x)
            x = x.to(product_dtype(shared[0], x, x))
            hidden = {name: self._project_down(update, x, slots) for name, update in given.items()}
        elif given:
            x = x.to(product_dtype(shared[0], x, next(iter(given.values())).lora_A))
            hidden = dict(zip(given, slots.project_tokens_down(x, list(given.values())), strict=True))
        projected = []
        for (name, update), out in zip(updates.items(), shared, strict=True):
            out = slots.of_tokens(out)  # a copy, so that it may be written to
            if update is not None:
                out = self._scaled(name, slots.add_projected_up(out, hidden[name], update), slots)
            projected.append(out)
        return projected

    def _project_down(self, update: LowRankUpdate, x: Tensor, slots: Slots) -> Any:
        x = update.dropout(x) if self.training else x
        return slots.project_down(x.to(product_dtype(x, x, update.lora_A)), update)

    def _update_of(self, name: str) -> LowRankUpdate | None:
        experts: Any = self._modules["experts"]
        return experts._modules.get(name)

    def _output_bias(self) -> Tensor | None:
        return getattr(self._layer(self.structure.output), "bias", None)

    def _weigh_bias(self, out: Tensor, weights: Tensor) -> Tensor:
        """Correct the output bias, which was added once, to sum_k g_k times; for weights that do not sum to one."""
        bias = self._output_bias()
        return out if bias is None else out + ((weights.sum(dim=-1, keepdim=True) - 1) * bias).to(out.dtype)

    def _scaled(self, name: str, out: Tensor, slots: Slots, with_bias: bool = True) -> Tensor:
        """Multiply each slot with its expert's c; the identity for plain LoRA."""
        update = self._update_of(name)
        if update is None or update.magnitude is None:
            return out
        layer = self._layer(name)
        bias = getattr(layer, "bias", None) if with_bias else None
        return apply_dora_scale(out, update.scale(layer)[slots.expert], bias)
