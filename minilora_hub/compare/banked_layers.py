"""Layers of a base that serve many adapters at once: one call of the base layer for all rows, then the updates.

A batch has rows of several adapters in contiguous groups. `BankedLinear` calls its base layer once for the whole batch
and adds the update of each group's adapter to its rows, those of few rows together. `BankedBlock` does the same for a
feed-forward block where some groups have a MixLoRA: their tokens become slots between the block's projections, which
are still called once. The cost of a step depends on the adapters in the batch, not on the number that is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from minilora_hub.compare.batch_rows import BatchRows, Group, with_solo
from minilora_hub.compare.linear_updates import LinearUpdate, StackedUpdates
from minilora_hub.remote_code.feed_forward import FeedForwardStructure
from minilora_hub.remote_code.fused_experts import AdaptedExperts
from minilora_hub.remote_code.linear_layers import is_only_its_product, only_product_of
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts
from minilora_hub.remote_code.routed_linear import RoutedLinear

FEW_TOKENS = 64
"""Tokens of a batch up to which groups are computed together: more fill a product for each adapter."""


MOST_PLANS = 16
"""Plans that a layer keeps: there are more of one arrangement where mixtures vary the number of experts per token."""


class _Updated(NamedTuple):
    """Adjacent tokens of a batch with the update of one adapter, or stacked ones of several."""

    start: int
    stop: int
    update: LinearUpdate | StackedUpdates | RoutedLinear
    group: int = 0  # index of the adapter's group


def _hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks)


def _adjoins(run: list[Group], group: Group) -> bool:
    """Return whether a group follows a run, has as many rows as each group of it, and another adapter."""
    last = run[-1]
    alike = last.stop == group.start and last.stop - last.start == group.stop - group.start
    return alike and all(group.key != other.key for other in run)


def _is_dense(ranks: list[int]) -> bool:
    """Return whether a stack of these ranks is at most half zeros."""
    return len(ranks) * max(ranks) <= 2 * sum(ranks)


class BankedLinear(nn.Module):
    """A linear of the base, and the updates of the adapters that are loaded: (rows, ..., in) -> (rows, ..., out).

    Args:
        base_layer: any linear of the base. It is only called; its weight format does not matter.
        rows: the model's `BatchRows`.

    Attributes:
        updates: adapter -> its `LinearUpdate` or `RoutedLinear` here. Not registered as parameters. Call `forget` after
            a change.
    """

    def __init__(self, base_layer: nn.Module, rows: BatchRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows
        self.updates: dict[str, LinearUpdate | RoutedLinear] = {}
        self._arrangement: object = None
        self._plans: dict[tuple[tuple[Group, ...], int, bool, bool], list[_Updated]] = {}  # of this arrangement
        self._stacks: dict[tuple[str, ...], StackedUpdates] = {}

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
        for start, stop, update, index in self._planned(tuple(groups), per_row, out.shape[0]):
            whole = stop - start == out.shape[0]
            mine = out if whole else out[start:stop]
            theirs = x if whole else x[start:stop]
            if isinstance(update, RoutedLinear):
                routes = update.route(theirs, ((stop - start) // per_row, per_row))
                mine += update.mixed_update(mine, theirs, routes)
                self.rows.record((recorded_as or groups)[index], update, routes)
            else:
                update.add_to_(mine, theirs, self.bias)

    def forget(self) -> None:
        """Drop what was made of the updates."""
        self.rows.stacked_bytes -= sum(stack.nbytes for stack in self._stacks.values())
        self._plans, self._stacks = {}, {}

    def _planned(self, groups: tuple[Group, ...], per_row: int, tokens: int) -> list[_Updated]:
        """Return what is added to which tokens. It is kept for the next forward, and made anew when rows change."""
        if self._arrangement is not self.rows.arrangement or len(self._plans) >= MOST_PLANS:
            self._arrangement, self._plans = self.rows.arrangement, {}
        key = groups, per_row, tokens <= FEW_TOKENS, self.rows.repeated
        if key not in self._plans:
            self._plans[key] = self._plan(*key)
        return self._plans[key]

    def _plan(self, groups: tuple[Group, ...], per_row: int, few: bool, stays: bool) -> list[_Updated]:
        """Split the groups into runs: each by itself, or with `few` tokens together with its neighbours.

        That takes a stack of their updates, which is only made for an arrangement that `stays`.
        """
        runs: list[list[Group]] = []
        ranks: list[int] = []  # of the last run; empty where nothing can be stacked on it
        for group in groups:
            update = self.updates.get(group.key)
            if update is None:
                continue
            stackable = few and (stays or bool(self._stacks))
            rank = len(update.lora_a) if stackable and isinstance(update, LinearUpdate) else 0
            if rank and ranks and _adjoins(runs[-1], group) and _is_dense([*ranks, rank]):
                runs[-1].append(group)
                ranks.append(rank)
            else:
                runs.append([group])
                ranks = [rank] if rank else []
        if few and stays:
            self._stack([tuple(group.key for group in run) for run in runs if len(run) > 1])
        plan: list[_Updated] = []
        for run in runs:
            stack = self._stacks.get(tuple(group.key for group in run))
            if stack is not None:
                plan.append(_Updated(run[0].start * per_row, run[-1].stop * per_row, stack))
                continue
            for group in run:
                update = self.updates[group.key]
                if isinstance(update, RoutedLinear):
                    update = with_solo(update, group.solo)
                plan.append(_Updated(group.start * per_row, group.stop * per_row, update, groups.index(group)))
        return plan

    def _stack(self, wanted: Sequence[tuple[str, ...]]) -> None:
        """Stack the updates of these adapters, each at most once, as far as there is memory, instead of others."""
        if all(keys in self._stacks for keys in wanted):
            return
        held = self._stacks
        self.forget()
        for keys in wanted:
            if not any(key in other for key in keys for other in self._stacks):
                updates: list[Any] = [self.updates[key] for key in keys]
                stack = held.get(keys) or StackedUpdates.of(updates)
                if self.rows.stacked_bytes + stack.nbytes <= self.rows.most_stacked_bytes:
                    self._stacks[keys] = stack
                    self.rows.stacked_bytes += stack.nbytes


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
