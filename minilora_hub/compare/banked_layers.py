"""Layers of a base that serve many adapters at once: one call of the base layer for all rows, then the updates.

A batch has rows of several adapters in contiguous groups. `BankedLinear` calls its base layer once for the whole batch
and adds the update of each group's adapter to its rows. `BankedBlock` does the same for a feed-forward block where some
groups have a MixLoRA: their tokens become slots between the block's projections, which are still called once. The cost
of a step depends on the adapters in the batch, not on the number that is loaded.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from minilora_hub.remote_code.adapted_linear import AdaptedLinear, add_low_rank_, apply_dora_scale_
from minilora_hub.remote_code.feed_forward import FeedForwardStructure
from minilora_hub.remote_code.fused_experts import AdaptedExperts
from minilora_hub.remote_code.linear_layers import is_only_its_product, only_product_of
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routed_linear import RoutedLinear, RoutedModule
from minilora_hub.remote_code.routing_record import Routes


class Group(NamedTuple):
    """Rows `start` to `stop` of the batch have the adapter `key`; with `solo`, only this expert serves them."""

    start: int
    stop: int
    key: str
    solo: int | None = None


Routing = dict[Group, dict[str, list[Routes]]]


@dataclass
class BatchRows:
    """The adapters of the rows of a batch, shared by every banked layer of a model.

    Attributes:
        count: number of rows.
        groups: the groups that have an adapter; rows of the bare base are in none.
        routing: for each group with a MixLoRA, the routing of the last forward: decoder layer -> `Routes` of the
            group's rows * seq tokens, one for each router of the layer.
    """

    count: int = 0
    groups: tuple[Group, ...] = ()
    routing: Routing = field(default_factory=dict)

    def record(self, group: Group, module: RoutedModule, routes: Routes) -> None:
        """Add what a router decided for the tokens of a group."""
        self.routing.setdefault(group, {}).setdefault(module.layer, []).append(routes)

    def arrange(self, keys: Sequence[str | None], solos: Sequence[int | None] | None = None) -> None:
        """Set each row's adapter and solo expert; adjacent rows with the same ones form a group."""
        rows = list(zip(keys, solos or [None] * len(keys), strict=True))
        groups, start = [], 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[start]:
                key, solo = rows[start]
                if key is not None:
                    groups.append(Group(start, stop, key, solo))
                start = stop
        self.count, self.groups = len(keys), tuple(groups)


@dataclass(frozen=True)
class SoloRouting:
    """Route every token to one expert with weight 1, which shows what this expert has learned; as `TopKRouting`."""

    expert: int
    weights_sum_to_one: ClassVar[bool] = True
    needs_token_mask: ClassVar[bool] = False

    def route(self, logits: torch.Tensor, *context: Any) -> Routes:
        """`Routes` of the tokens with these logits, (tokens, experts)."""
        selected = torch.full((logits.shape[0], 1), self.expert, device=logits.device)
        return Routes(torch.ones_like(selected, dtype=torch.float32), selected)


def with_solo(module: Any, expert: int | None) -> Any:
    """Return a routed module whose tokens all go to one expert, if there is one; it shares every tensor."""
    if expert is None:
        return module
    module = copy.copy(module)
    module.routing = SoloRouting(expert)
    return module


class LinearUpdate(NamedTuple):
    """Update of one linear by one adapter: A [r, in], B [out, r], s, and DoRA's c [out] or None."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    scale: torch.Tensor | None

    @classmethod
    @torch.no_grad()
    def of(cls, adapted: AdaptedLinear) -> LinearUpdate:
        """Return the tensors of an adapted linear; c is computed once, because nothing is trained here."""
        update = adapted.update
        scale = None if update.magnitude is None else update.scale(adapted.base_layer).detach()
        return cls(update.lora_A.detach(), update.lora_B.detach(), update.scaling, scale)


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


class BankedLinear(nn.Module):
    """A linear of the base, and the updates of the adapters that are loaded: (rows, ..., in) -> (rows, ..., out).

    Args:
        base_layer: any linear of the base. It is only called; its weight format does not matter.
        rows: the model's `BatchRows`.

    Attributes:
        updates: adapter -> its `LinearUpdate` or `RoutedLinear` here. Not registered as parameters.
    """

    def __init__(self, base_layer: nn.Module, rows: BatchRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        self.updates: dict[str, LinearUpdate | RoutedLinear] = {}

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight, whose dtype some models read."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias, if it has one."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Call the base layer once, then add each group's update in place."""
        out = self.call_base(x, *args, **kwargs)
        groups = self.rows.groups
        if groups and self.updates:
            tokens = x.reshape(-1, x.shape[-1])
            self.add_updates(out.view(-1, out.shape[-1]), tokens, groups, tokens.shape[0] // self.rows.count)
        return out

    def call_base(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """Call the base layer; one that is only its product multiplies few rows in the fastest way."""
        layer: Any = self._modules["base_layer"]  # attribute look-ups of nn.Module cost as much as a small product
        if args or kwargs or not is_only_its_product(layer):
            out = layer(x, *args, **kwargs).contiguous()
            return out.clone() if _hooked(layer) else out  # a hook may keep the output
        return only_product_of(layer, x).contiguous()

    def add_updates(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        groups: Sequence[Group],
        per_row: int,
        recorded_as: Sequence[Group] | None = None,
    ) -> None:
        """Add the updates of the groups that have one here to their rows, in place.

        Args:
            out: (tokens, out).
            x: (tokens, in).
            groups: in rows of `per_row` tokens each.
            per_row: tokens per row.
            recorded_as: the batch's own groups that these are, where rows have another order here.
        """
        for group, own in zip(groups, recorded_as or groups, strict=True):
            start, stop, key, solo = group
            update = self.updates.get(key)
            if update is not None:
                whole = (stop - start) * per_row == out.shape[0]
                mine = out if whole else out[start * per_row : stop * per_row]
                theirs = x if whole else x[start * per_row : stop * per_row]
                if isinstance(update, RoutedLinear):
                    routes = with_solo(update, solo).route(theirs, (stop - start, per_row))
                    mine += update.mixed_update(mine, theirs, routes)
                    self.rows.record(own, update, routes)
                    continue
                add_low_rank_(mine, theirs, update.lora_a, update.lora_b, update.scaling)
                if update.scale is not None:
                    apply_dora_scale_(mine, update.scale, self.bias)


class _Run(NamedTuple):
    """Adjacent rows of a block: of one adapter with a `mixture` there, or of any `groups` without."""

    start: int
    stop: int
    groups: tuple[Group, ...]
    mixture: MixtureOfLoraExperts | None = None


class BankedBlock(nn.Module):
    """A feed-forward block of the base, and the mixtures of the MixLoRA adapters that are loaded: as the block's shape.

    Args:
        base_block: the base's block, whose projections are `BankedLinear`.
        structure: its projections, and the computation between them.
        rows: the model's `BatchRows`.

    Attributes:
        mixtures: adapter -> its mixture here.
    """

    def __init__(self, base_block: nn.Module, structure: FeedForwardStructure, rows: BatchRows) -> None:
        super().__init__()
        self.base_block = base_block
        self.structure = structure
        self.rows = rows
        self.mixtures: dict[str, MixtureOfLoraExperts] = {}

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the block once for all rows, and the experts of the groups with a mixture between its projections."""
        if not any(group.key in self.mixtures for group in self.rows.groups):
            return self.base_block(hidden_states)
        x = hidden_states.flatten(0, -2)  # (tokens, d)
        per_row = x.shape[0] // self.rows.count
        shared = [self.base_block.get_submodule(name)(x) for name in self.structure.inputs]  # each (tokens, out)
        parts, places, at = [], [], 0
        linear_groups: list[Group] = []
        recorded_as: list[Group] = []
        for rows in self._runs():
            tokens = slice(rows.start * per_row, rows.stop * per_row)
            inputs = [out[tokens] for out in shared]
            routed: Any = None
            if rows.mixture is None:
                part = self.structure.activate(*inputs)  # (run's tokens, ff)
                linear_groups += [
                    Group(at + (start - rows.start) * per_row, at + (stop - rows.start) * per_row, key, solo)
                    for start, stop, key, solo in rows.groups
                ]
                recorded_as += rows.groups
            else:
                routed = rows.mixture.expand(x[tokens], inputs, (rows.stop - rows.start, per_row))
                part = routed.hidden  # (run's tokens, ff), or (run's slots, ff) where DoRA scales each slot
                self.rows.record(rows.groups[0], rows.mixture, routed.routes)
            parts.append(part)
            places.append((tokens, slice(at, at + part.shape[0]), rows.mixture, routed))
            at += part.shape[0]

        down = self.base_block.get_submodule(self.structure.output)
        hidden = torch.cat(parts) if len(parts) > 1 else parts[0]
        projected = down.call_base(hidden)  # type: ignore[operator]  # the one call of the output projection
        down.add_updates(projected, hidden, linear_groups, 1, recorded_as)  # type: ignore[operator]
        out = projected if at == x.shape[0] else projected.new_empty(x.shape[0], projected.shape[-1])
        for tokens, place, mixture, routed in places:
            part = projected[place]
            result = part if mixture is None else mixture.combine(part, routed)
            if out is not projected or result is not part:
                out[tokens] = result
        return out.view_as(hidden_states)

    def _runs(self) -> list[_Run]:
        """Split the rows into runs that are computed together: those of one mixture, and those without one."""
        runs: list[_Run] = []
        at = 0
        for group in self.rows.groups:
            mixture = self.mixtures.get(group.key)
            if mixture is not None:
                if at < group.start:
                    runs.append(
                        _Run(at, group.start, tuple(g for g in self.rows.groups if at <= g.start < group.start))
                    )
                runs.append(_Run(group.start, group.stop, (group,), with_solo(mixture, group.solo)))
                at = group.stop
        if at < self.rows.count:
            runs.append(_Run(at, self.rows.count, tuple(g for g in self.rows.groups if g.start >= at)))
        return runs


class BankedExperts(nn.Module):
    """Stacked experts of a base, and the adapters on them that are loaded: as the base's module.

    Each run of rows is computed by itself, so the experts' weights are read once for each adapter in a batch.

    Args:
        base_experts: the base's module.
        rows: the model's `BatchRows`.

    Attributes:
        adapted: adapter -> its `AdaptedExperts` here. Not registered as modules.
    """

    def __init__(self, base_experts: nn.Module, rows: BatchRows) -> None:
        super().__init__()
        self.base_experts = base_experts
        self.rows = rows
        self.adapted: dict[str, AdaptedExperts] = {}

    def forward(self, hidden_states: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
        """Run the experts of each run of rows on its tokens, (tokens, d); `routing` is theirs, each (tokens, K)."""
        groups = [group for group in self.rows.groups if group.key in self.adapted]
        if not groups:
            return self.base_experts(hidden_states, *routing)
        per_row = hidden_states.shape[0] // self.rows.count
        starts = sorted({0, *(group.start for group in groups), *(group.stop for group in groups)})
        own = {group.start: self.adapted[group.key] for group in groups}
        out = torch.empty_like(hidden_states)
        for start, stop in zip(starts, [*starts[1:], self.rows.count], strict=True):
            if start < stop:
                tokens = slice(start * per_row, stop * per_row)
                experts = own.get(start, self.base_experts)
                out[tokens] = experts(hidden_states[tokens], *(each[tokens] for each in routing))
        return out
