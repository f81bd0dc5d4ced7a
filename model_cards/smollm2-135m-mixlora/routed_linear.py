"""LoRA experts with a router on one linear, and the router's part that it shares with the mixture of a block.

For a token x with experts e_1 .. e_K and weights g_1 .. g_K, which `routing.py` decides:

    y = W x + b + s sum_k g_k B_{e_k} A_{e_k} x

which is MoLA (arXiv 2402.08562), whole adapters under a router, and with Arrow's router PEFT's Arrow. Only the update
is weighted: the base's output is kept whatever the weights sum to, also for a token over an expert's capacity.

A x is computed for every expert, in one product, since the experts of a linear are few and of low rank.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted_linear import AdaptedLinear, product_dtype
from .linear_layers import is_only_its_product, only_product_of
from .routing import ArrowRouting, Routing
from .routing_record import Routes, RoutingRecord, current_record


class RoutedModule(nn.Module):
    """A module with a router.

    Attributes:
        router: router weight, [experts, d].
        routing: which experts serve which token.
        jitter_noise: in training, the router's input is multiplied by U(1 - noise, 1 + noise).
        layer: canonical name of its decoder layer.
    """

    router: nn.Parameter

    def set_router(self, router: Tensor, routing: Routing, jitter_noise: float, layer: str) -> None:
        self.router = nn.Parameter(router)
        self.routing, self.jitter_noise, self.layer = routing, jitter_noise, layer
        # (batch, seq) of the last forward in training that knew its padding
        self._masked_shape: Sequence[int] | None = None

    def route(self, x: Tensor, leading_shape: Sequence[int]) -> Routes:
        """Route the tokens x, (tokens, d), and add the decision to the open record, if there is one."""
        x, record = x.float(), current_record()
        if len(leading_shape) == 1:  # OPT flattens the tokens before its feed-forward linears
            shape = None if record is None else record.shape
            if shape is not None and shape.numel() == len(x):
                leading_shape = shape
            elif self.training and self.routing.needs_token_mask:
                raise ValueError(
                    f"{self.layer}: the base flattens its tokens here, and a capacity is one of each sequence: call "
                    "the model with input_ids or inputs_embeds, and pass use_reentrant=False and "
                    "context_fn=routing_record.checkpoint_contexts to a checkpoint of its layers"
                )
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        token_mask = self._token_mask(record, leading_shape, x.device)
        device = x.device.type  # entering autocast costs as much as a small product
        off = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with off:  # routing in fp32, as the reference does
            logits = F.linear(x, self.router.float())  # (tokens, experts)
            if isinstance(self.routing, ArrowRouting):
                logits = self.routing.similarities(logits)
            routes = self.routing.route(logits, leading_shape, self.training, token_mask)
        if record is not None:
            selected = routes.selected if routes.kept is None else routes.selected.masked_fill(~routes.kept, -1)
            record.logits.append(logits.view(*leading_shape, -1))
            record.selected.append(selected.view(*leading_shape, -1))
            record.weights.append(routes.weights.view(*leading_shape, -1))
            record.layers.append(self.layer)
        return routes

    def _token_mask(
        self, record: RoutingRecord | None, leading_shape: Sequence[int], device: torch.device
    ) -> Tensor | None:
        """(batch, seq), 0 on padding, where the routing depends on it and the record has it; else None."""
        if not (self.training and self.routing.needs_token_mask):
            return None
        if record is None:
            if torch.is_grad_enabled() and self._masked_shape == leading_shape:
                raise ValueError(
                    "attention_mask: gradient checkpointing repeats a forward without the padding it had, which takes "
                    "no capacity: pass use_reentrant=False and context_fn=routing_record.checkpoint_contexts to the "
                    "checkpoint"
                )
            return None
        mask = record.token_mask
        self._masked_shape = None if mask is None else leading_shape
        # With a cache the mask also covers the past.
        return None if mask is None else mask[..., -leading_shape[-1] :].to(device)


class RoutedLinear(RoutedModule, AdaptedLinear):
    """A base linear with experts, `update`, whose `set_router` was called: (..., in) -> (..., out)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self.base_layer
        is_product = not (self.training or args or kwargs) and is_only_its_product(layer)
        out = only_product_of(layer, x) if is_product else layer(x, *args, **kwargs)
        routes = self.route(x.flatten(0, -2), x.shape[:-1])
        return out + self.mixed_update(out, x.flatten(0, -2), routes).view_as(out)

    def mixed_update(self, out: Tensor, x: Tensor, routes: Routes) -> Tensor:
        """s sum_k g_k B_{e_k} A_{e_k} x, (tokens, out), in the dtype of the base's output `out`; x is (tokens, in)."""
        update, dtype = self.update, product_dtype(out, x, self.update.lora_A)
        a, b = update.lora_A.to(dtype), update.lora_B.to(dtype)
        gates = x.new_zeros(len(x), len(a), dtype=torch.float32).scatter_add(1, routes.selected, routes.weights)
        x = update.dropout(x) if self.training else x
        hidden = F.linear(x.to(dtype), a.flatten(0, 1)).unflatten(-1, a.shape[:2])  # (tokens, experts, r)
        hidden = hidden * (update.scaling * gates).to(dtype).unsqueeze(-1)
        return F.linear(hidden.flatten(1), b.transpose(0, 1).flatten(1)).to(out.dtype)  # with [out, experts * r]
