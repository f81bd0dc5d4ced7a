"""Which rows of a batch have which adapter, shared by every banked layer of a model, and which have one expert only."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

from minilora_hub.remote_code.routed_linear import RoutedModule
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
    """The adapters of the rows of a batch.

    Attributes:
        count: number of rows.
        groups: the groups that have an adapter; rows of the bare base are in none.
        routing: for each group with a MixLoRA, the routing of the last forward: decoder layer -> `Routes` of the
            group's rows * seq tokens, one for each router of the layer.
        arrangement: an object that is another one when the rows, or the adapters that are loaded, have changed.
        repeated: whether the rows are arranged as for the forward before.
        stacked_bytes: bytes of the `StackedUpdates` of all layers, and the most that they may have.
        most_stacked_bytes: the most that these may be.
    """

    count: int = 0
    groups: tuple[Group, ...] = ()
    routing: Routing = field(default_factory=dict)
    arrangement: object = None
    repeated: bool = False
    stacked_bytes: int = 0
    most_stacked_bytes: float = math.inf
    _arranged: list[tuple[str | None, int | None]] | None = None

    def record(self, group: Group, module: RoutedModule, routes: Routes) -> None:
        """Add what a router decided for the tokens of a group."""
        self.routing.setdefault(group, {}).setdefault(module.layer, []).append(routes)

    def arrange(self, keys: Sequence[str | None], solos: Sequence[int | None] | None = None) -> None:
        """Set each row's adapter and solo expert; adjacent rows with the same ones form a group."""
        rows = list(zip(keys, solos or [None] * len(keys), strict=True))
        self.repeated = rows == self._arranged
        if not self.repeated:
            self.forget()
            self._arranged = rows
        groups, start = [], 0
        for stop in range(1, len(rows) + 1):
            if stop == len(rows) or rows[stop] != rows[start]:
                key, solo = rows[start]
                if key is not None:
                    groups.append(Group(start, stop, key, solo))
                start = stop
        self.count, self.groups, self.routing = len(keys), tuple(groups), {}

    def clear(self) -> None:
        """Have no rows between two forwards."""
        self.count, self.groups = 0, ()

    def forget(self) -> None:
        """Have the layers look again at the updates of their adapters."""
        self.arrangement, self._arranged = object(), None


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
