"""The arrangements of a mixture's slots in which Python reads no number; see `expert_slots.py`."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from .adapted_linear import LowRankUpdate
from .expert_slots import Slots


class SlotsGrouped(Slots):
    """Slots sorted by expert, every expert's block in one grouped product."""

    DTYPE = torch.bfloat16

    def __init__(self, selected: Tensor, num_experts: int) -> None:
        self.num_tokens, self.per_token = selected.shape
        self.expert, self.order = selected.flatten().sort(stable=True)
        self.token = self.order // self.per_token
        # The end of each expert's block, (experts). Not bincount, which waits for the device.
        every = torch.arange(num_experts, device=selected.device)
        self.ends = (self.expert <= every.unsqueeze(-1)).sum(dim=-1, dtype=torch.int32)

    @classmethod
    def can(cls, updates: Iterable[LowRankUpdate]) -> bool:
        """Whether the grouped product takes these updates: `DTYPE`, at whole 16 bytes, and from torch 2.10 on."""
        tensors = [tensor for update in updates for tensor in (update.lora_A, update.lora_B)]
        whole = all(t.dtype == cls.DTYPE and t.shape[-1] % 8 == 0 and t.shape[-2] % 8 == 0 for t in tensors)
        return whole and hasattr(F, "grouped_mm")

    def project_down(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        return F.grouped_mm(x, update.lora_A.mT, offs=self.ends)

    def project_up(self, hidden: Tensor, update: LowRankUpdate) -> Tensor:
        return F.grouped_mm(hidden, update.lora_B.mT, offs=self.ends)


class SlotsOfTraining(SlotsGrouped):
    """`SlotsGrouped` in float32 on a CPU, for training: autograd keeps and copies fewer tensors of all slots."""

    DTYPE = torch.float32
    order: Tensor

    def add_projected_up(self, out: Tensor, hidden: Tensor, update: LowRankUpdate) -> Tensor:
        return self.project_up(hidden * update.scaling, update).add_(out)

    def sum_weighted(self, per_slot: Tensor, weights: Tensor) -> Tensor:
        """The sum over each token's slots, (slots, n), times their weights, (tokens, K): (tokens, n)."""
        places = self.order.argsort()  # of each token's slots
        return F.embedding_bag(places.view_as(weights), per_slot, mode="sum", per_sample_weights=weights)


class SlotsGathered(Slots):
    """Slots in token order, each with its own expert's weights gathered."""

    order = None

    def __init__(self, selected: Tensor) -> None:
        self.expert = selected.flatten()
        self.num_tokens, self.per_token = selected.shape
        self.token = torch.arange(self.num_tokens, device=selected.device).repeat_interleave(self.per_token)

    def project_down(self, x: Tensor, update: LowRankUpdate) -> Tensor:
        return torch.bmm(update.lora_A[self.expert], x.unsqueeze(-1)).squeeze(-1)

    def project_up(self, hidden: Tensor, update: LowRankUpdate) -> Tensor:
        return torch.bmm(update.lora_B[self.expert], hidden.unsqueeze(-1)).squeeze(-1)
