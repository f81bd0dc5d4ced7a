"""Arrange the slots of a mixture, its (token, chosen expert) pairs, so that low-rank products are few and large.

N tokens have up to N * K slots. Six arrangements give the same results, and `MixtureOfLoraExperts` chooses one (the
last three are in `device_slots.py`):

    SlotsOfOneToken  a single token: each expert multiplies one vector.
    SlotsByExpert    sorted by expert: each expert multiplies one contiguous block. Python reads the sizes of the
                     blocks, which is free on a CPU and waits for the device elsewhere.
    SlotsMasked      token order: one product with the matrices of all experts, masked. For few narrow experts.
    SlotsGrouped     sorted by expert, one grouped product (`torch.nn.functional.grouped_mm`, bf16). For many slots
                     on a GPU: nothing waits.
    SlotsOfTraining  the same in float32, for training on a CPU.
    SlotsGathered    token order, the expert's weights gathered per slot. For few slots on a GPU, and under
                     torch.compile: nothing waits.

SlotsByExpert and SlotsOfOneToken leave out slots that are not kept; the others compute them with weight 0.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapted_linear import LowRankUpdate


class Slots:
    """What every arrangement does with its slots; a subclass has the products.

    Attributes:
        expert: expert of each slot, (slots).
        token: token of each slot, (slots).
        order: place of each slot among the (tokens * K); None where they are in this order.
    """

    num_tokens: int
    per_token: int
    expert: Tensor
    token: Tensor
    order: Tensor | None

    def parts(self) -> "list[Slots]":
        """The slots in groups that are computed one after the other."""
        return [self]

    def of_tokens(self, per_token: Tensor) -> Tensor:
        """Each slot's token: (tokens, n) -> (slots, n), a copy."""
        return per_token.index_select(0, self.token)

    def of_slots(self, per_slot: Tensor) -> Tensor:
        """(tokens, K) -> (slots, 1) in this arrangement's order."""
        flat = per_slot.flatten()
        return (flat if self.order is None else flat[self.order]).unsqueeze(-1)

    def project_down(self, x: Tensor, update: LowRankUpdate) -> Any:
        """A_e x: (slots, in) -> (slots, r), in a form of the arrangement's own."""
        raise NotImplementedError

    def project_up(self, hidden: Any, update: LowRankUpdate) -> Tensor:
        """B_e hidden: (slots, r) -> (slots, out)."""
        raise NotImplementedError

    def project_tokens_down(self, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Any]:
        """A_e x of each slot's token, for several updates of one input: (tokens, in) -> a (slots, r) for each."""
        x = self.of_tokens(x)
        return [self.project_down(x, update) for update in updates]

    def add_projected_up(self, out: Tensor, hidden: Any, update: LowRankUpdate) -> Tensor:
        """out + s B_e hidden: (slots, r) -> (slots, out). Without gradients `out` may be written to."""
        return torch.add(out, self.project_up(hidden, update).to(out.dtype), alpha=update.scaling)

    def sum_slots(self, per_slot: Tensor, total: Tensor | None = None) -> Tensor:
        """Sum each token's slots: (slots, n) -> (tokens, n); added to the `total` of the parts before."""
        if self.order is None:
            return per_slot.view(self.num_tokens, self.per_token, -1).sum(dim=1)
        total = per_slot.new_zeros(self.num_tokens, per_slot.shape[-1]) if total is None else total
        return total.index_add_(0, self.token, per_slot)

    def add_to_tokens(self, out: Tensor, hidden: Any, update: LowRankUpdate) -> Tensor:
        """out + the sum over each token's slots of s B_e hidden: (slots, r) -> (tokens, out).

        Without gradients `out` may be written to.
        """
        added = self.project_up(hidden, update)
        if self.order is None or out.dtype != added.dtype:
            return out + (self.sum_slots(added) * update.scaling).to(out.dtype)
        return torch.index_add(out, 0, self.token, added, alpha=update.scaling)


class SlotsByExpert(Slots):
    """Slots sorted by expert: each expert that serves any multiplies one contiguous block, with its own weights.

    What is projected down is a list of blocks, one for each expert.
    """

    order: Tensor
    FEW = 64  # slots up to which sorting in Python is quicker than starting the kernels for it

    def __init__(self, selected: Tensor, kept: Tensor | None = None) -> None:
        self.num_tokens, self.per_token = selected.shape
        flat = selected.flatten()
        places = None if kept is None else kept.flatten().nonzero().squeeze(-1)
        flat = flat if places is None else flat[places]  # expert of each slot
        if flat.numel() <= self.FEW and flat.device.type == "cpu":
            experts = flat.tolist()
            in_order = sorted(range(len(experts)), key=experts.__getitem__)
            served = Counter(experts[slot] for slot in in_order)
            self.experts, self.counts = list(served), list(served.values())
            by_expert = torch.tensor(in_order, dtype=torch.long)
            self.expert = flat[by_expert]
        else:
            self.expert, by_expert = flat.sort(stable=True)
            numbers, counts = torch.unique_consecutive(self.expert, return_counts=True)
            self.experts, self.counts = numbers.tolist(), counts.tolist()
        self.order = by_expert if places is None else places[by_expert]
        self.token = self.order // self.per_token

    def parts(self) -> list[Slots]:
        """Of many slots, those of each expert, so that what is computed of one stays in the processor's cache.

        Not with gradients: the backward pass of a part would be as large as that of all of them.
        """
        if len(self.token) <= self.FEW or torch.is_grad_enabled() or self.token.device.type != "cpu":
            return [self]
        parts: list[Slots] = []
        blocks = (each.split_with_sizes(self.counts) for each in (self.expert, self.order, self.token))
        for expert, count, *own in zip(self.experts, self.counts, *blocks, strict=True):
            part = copy(self)
            part.experts, part.counts = [expert], [count]
            part.expert, part.order, part.token = own
            parts.append(part)
        return parts

    def _served(self, experts: Sequence[Tensor]) -> list[Tensor]:
        return [experts[expert] for expert in self.experts]

    def project_down(self, x: Tensor, update: LowRankUpdate) -> list[Tensor]:
        blocks, experts = x.split_with_sizes(self.counts), self._served(update.experts(x.dtype)[0])
        return [F.linear(rows, a) for rows, a in zip(blocks, experts, strict=True)]

    def add_projected_up(self, out: Tensor, hidden: Sequence[Tensor], update: LowRankUpdate) -> Tensor:
        experts, scaling = self._served(update.experts(hidden[0].dtype)[1]), update.scaling
        blocks = zip(out.split_with_sizes(self.counts), hidden, experts, strict=True)
        if not out.dtype == hidden[0].dtype == experts[0].dtype:
            return torch.cat([o + (F.linear(h, b) * scaling).to(o.dtype) for o, h, b in blocks])
        if torch.is_grad_enabled():
            return torch.cat([torch.addmm(o, h, b.mT, alpha=scaling) for o, h, b in blocks])
        for o, h, b in blocks:
            o.addmm_(h, b.mT, alpha=scaling)
        return out

    def project_up(self, hidden: Sequence[Tensor], update: LowRankUpdate) -> Tensor:
        blocks = zip(hidden, self._served(update.experts(hidden[0].dtype)[1]), strict=True)
        return torch.cat([F.linear(h, b) for h, b in blocks])


class SlotsOfOneToken(Slots):
    """The slots of a single token: each expert multiplies one vector.

    Products with vectors start in half the time of those with matrices of one row. What is projected down is a list of
    vectors [r], one for each expert.
    """

    def __init__(self, selected: Tensor, kept: Tensor | None = None) -> None:
        self.expert = selected.flatten() if kept is None else selected[kept]
        self.kept = kept
        self.experts = self.expert.tolist()

    def of_tokens(self, per_token: Tensor) -> Tensor:
        return torch.cat([per_token] * len(self.experts))  # starts sooner than repeat

    def of_slots(self, per_slot: Tensor) -> Tensor:
        return per_slot.view(-1, 1) if self.kept is None else per_slot[self.kept].unsqueeze(-1)

    def project_down(self, x: Tensor, update: LowRankUpdate) -> list[Tensor]:
        a = update.experts(x.dtype)[0]
        return [torch.mv(a[expert], row) for expert, row in zip(self.experts, x.unbind(), strict=True)]

    def project_tokens_down(self, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Any]:
        row, stacks = x.view(-1), [update.experts(x.dtype)[0] for update in updates]
        return [[torch.mv(a[expert], row) for expert in self.experts] for a in stacks]

    def add_projected_up(self, out: Tensor, hidden: Sequence[Tensor], update: LowRankUpdate) -> Tensor:
        b, scaling = update.experts(hidden[0].dtype)[1], update.scaling
        rows = zip(out.unbind(), hidden, self.experts, strict=True)
        if out.dtype != hidden[0].dtype:
            return torch.stack([row + (torch.mv(b[expert], h) * scaling).to(row.dtype) for row, h, expert in rows])
        if torch.is_grad_enabled():
            return torch.stack([torch.addmv(row, b[expert], h, alpha=scaling) for row, h, expert in rows])
        for row, h, expert in rows:
            row.addmv_(b[expert], h, alpha=scaling)
        return out

    def sum_slots(self, per_slot: Tensor, total: Tensor | None = None) -> Tensor:
        return per_slot.sum(dim=0, keepdim=True)

    def add_to_tokens(self, out: Tensor, hidden: Sequence[Tensor], update: LowRankUpdate) -> Tensor:
        b, row = update.experts(hidden[0].dtype)[1], out.view(-1)
        for h, expert in zip(hidden, self.experts, strict=True):
            if out.dtype == h.dtype:
                add = row.addmv if torch.is_grad_enabled() else row.addmv_
                row = add(b[expert], h, alpha=update.scaling)
            else:
                row = row + (torch.mv(b[expert], h) * update.scaling).to(row.dtype)
        return row.unsqueeze(0)


class SlotsMasked(Slots):
    """Slots in token order: one product with the matrices of all experts side by side, masked to each slot's expert.

    What is projected down is (slots, experts * r), 0 but for the r values of the slot's expert.
    """

    WIDE = 32  # columns, experts * r, up to which computing all is quicker than a small product for each expert

    order = None

    def __init__(self, selected: Tensor, num_experts: int) -> None:
        self.num_tokens, self.per_token = selected.shape
        self.expert = selected.flatten()
        self.chosen = F.one_hot(self.expert, num_experts).unsqueeze(-1)  # (slots, experts, 1)

    @classmethod
    def can(cls, updates: Iterable[LowRankUpdate]) -> bool:
        """Whether the experts of these updates are few and narrow enough."""
        return all(update.lora_A.shape[0] * update.lora_A.shape[1] <= cls.WIDE for update in updates)

    def of_tokens(self, per_token: Tensor) -> Tensor:
        return per_token.repeat(1, self.per_token).view(len(self.expert), -1)

    def project_down(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        return self._masked(F.linear(x, update.lora_A.to(x.dtype).flatten(0, 1)))

    def project_tokens_down(self, x: Tensor, updates: Sequence[LowRankUpdate]) -> list[Any]:
        return [self._masked(self.of_tokens(F.linear(x, u.lora_A.to(x.dtype).flatten(0, 1)))) for u in updates]

    def _masked(self, every: Tensor) -> Tensor:
        return (every.unflatten(-1, (self.chosen.shape[1], -1)) * self.chosen.to(every.dtype)).flatten(1)

    def add_projected_up(self, out: Tensor, hidden: Tensor, update: LowRankUpdate) -> Tensor:
        b = update.lora_B.to(hidden.dtype).mT.flatten(0, 1)  # (experts * r, out)
        if out.dtype != hidden.dtype:
            return out + (hidden @ b * update.scaling).to(out.dtype)
        add = out.addmm if torch.is_grad_enabled() else out.addmm_
        return add(hidden, b, alpha=update.scaling)

    def add_to_tokens(self, out: Tensor, hidden: Tensor, update: LowRankUpdate) -> Tensor:
        return self.add_projected_up(out, self.sum_slots(hidden), update)
