"""Route the tokens of a MixLoRA: which experts serve a token, with which weights, and the losses that balance them.

With p = softmax(router x), in fp32, over the E experts of a layer:

    top_k   the k largest p, divided by their sum                                  (arXiv 2404.15159, eq. 5)
    top_p   the largest p until they exceed top_p together, not divided by their sum      (arXiv 2403.07652)
    switch  the largest p, as it is; in training an expert serves the first `capacity` tokens of a sequence that chose
            it, and the others pass: y = p x                                              (arXiv 2101.03961)
    arrow   as top_k, with p = softmax(|router x| / temperature): a router's row is the direction of the input that its
            expert changes most, whose sign means nothing                                 (arXiv 2405.11157)

top_p and switch follow `moe_peft` 2.0.2, the reference's training code, where they are called ``mixlora-dynamic`` and
``mixlora-switch``. How this differs from it, each because the reference's result would be wrong:

- At inference its switch router returns its input and no expert is ever used; here inference is training without
  dropout, jitter and capacity. (With a capacity, what a token gets would depend on how much of its sequence is in the
  same call: generation with a cache would differ from generation without.)
- Padding counts in its losses of top_p and switch, and takes capacity; here it does neither.
- It multiplies what the experts see by the jitter as well (top_k and top_p); here only the router sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .routing_record import Routes, RoutingRecord

# ---- the decisions ----


def route_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, the k largest, divided by their sum: which is the softmax of the k largest logits.

    Of logits (tokens, experts), fp32; returns weights, fp32, and indices, (tokens, k), the largest first.
    """
    largest, selected = torch.topk(logits, k, dim=-1)
    return F.softmax(largest, dim=-1), selected


def route_top_p(logits: Tensor, top_p: float, temperature: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over the experts, the largest until their sum exceeds top_p, as they are.

    With q_1 >= q_2 >= … the sorted p / temperature (p where that is 0), slot j is kept if q_1 + … + q_{j-1} <= top_p:
    always one, and the one with which the sum exceeds top_p. The weights are the q of the kept slots.

    As in the reference, the temperature divides the probabilities, not the logits: it is equal to a threshold of
    ``top_p * temperature`` with weights divided by the temperature, and makes nothing softer or sharper.

    Of logits (..., experts), fp32; returns weights, fp32, 0 where not kept, indices, the largest first, and kept: all
    (..., experts).
    """
    probabilities = F.softmax(logits, dim=-1)
    if temperature > 0:
        probabilities = probabilities / temperature
    weights, selected = torch.sort(probabilities, dim=-1, descending=True)
    before = F.pad(weights.cumsum(dim=-1)[..., :-1], (1, 0))  # the sum of the slots before
    kept = before <= top_p
    return weights.masked_fill(~kept, 0.0), selected, kept


def route_switch(
    logits: Tensor, capacity: int | None = None, token_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The largest of the softmax over the experts, with its probability as weight.

    Args:
        logits: (..., seq, experts), fp32.
        capacity: tokens of a sequence that one expert serves: the first that chose it. None: as many as there are.
        token_mask: (..., seq), 0 on padding, which takes no capacity and is never refused. None: no padding.

    Returns: probability, fp32, index, and kept, None without a capacity: all (..., seq).
    """
    probability, selected = F.softmax(logits, dim=-1).max(dim=-1)
    if capacity is None:
        return probability, selected, None
    chosen = F.one_hot(selected, logits.shape[-1])  # (..., seq, experts)
    if token_mask is not None:
        chosen = chosen * token_mask.to(chosen).unsqueeze(-1)
    place = (chosen.cumsum(dim=-2) * chosen).sum(dim=-1)  # in its expert's queue, from 1; 0 for padding
    return probability, selected, place <= capacity


# ---- the losses ----


def _stacked(layers: Sequence[Tensor], attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Logits (layers, batch, seq, experts) on one device, and the weight of each token, (layers, batch, seq, 1)."""
    device = layers[0].device  # they may lie on several
    logits = torch.stack([layer.to(device) for layer in layers]).float()
    if attention_mask is None:
        counts = torch.ones(logits.shape[:-1], device=device)
    else:
        counts = attention_mask.to(device=device, dtype=torch.float32).expand(logits.shape[:-1])
    return logits, counts.unsqueeze(-1)


def _balance(probabilities: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
    """E * sum_i f_i P_i. probabilities and chosen (0 or 1) are (layers, batch, seq, experts), counts has 1 expert."""
    total = counts.sum().clamp_min(1.0)
    share = (chosen * counts).sum(dim=(0, 1, 2)) / total  # f: (experts)
    mean_probability = (probabilities * counts).sum(dim=(0, 1, 2)) / total  # P: (experts)
    return probabilities.shape[-1] * (share * mean_probability).sum()


def load_balancing_loss(layers: Sequence[Tensor], k: int, attention_mask: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i over the tokens of all layers (eq. 7 of the paper; the form that transformers' MoE models use).

    f_i is the share of tokens that chose expert i, summed over their k slots, P_i the mean probability of expert i.
    With k = 1 it is Switch Transformers' loss (eq. 4 to 6 there), where a token over capacity counts as well.

    Args:
        layers: router logits, a tensor (batch, seq, experts) per layer.
        k: experts per token. The result, a scalar in fp32, is k when the load is perfectly even.
        attention_mask: (batch, seq), 0 on padding, which does not count. None: every token counts.
    """
    logits, counts = _stacked(layers, attention_mask)
    probabilities = F.softmax(logits, dim=-1)
    chosen = torch.topk(probabilities, k, dim=-1).indices
    chosen = F.one_hot(chosen, probabilities.shape[-1]).sum(dim=-2).float()  # k ones a token
    return _balance(probabilities, chosen, counts)


def top_p_balancing_loss(
    layers: Sequence[Tensor], top_p: float, temperature: float = 0.0, attention_mask: Tensor | None = None
) -> Tensor:
    """E * sum_i f_i P_i, where f_i is the share of tokens whose kept slots hold expert i (`moe_peft`'s form).

    P_i is the mean of the probabilities, whatever the temperature. When the load is perfectly even, the result is the
    mean number of experts per token. Args: see `route_top_p` and `load_balancing_loss`.
    """
    logits, counts = _stacked(layers, attention_mask)
    _, selected, kept = route_top_p(logits, top_p, temperature)
    probabilities = F.softmax(logits, dim=-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, selected, kept.float())
    return _balance(probabilities, chosen, counts)


def router_z_loss(layers: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Mean over the tokens of all layers of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Args: see `load_balancing_loss`.
    """
    logits, counts = _stacked(layers, attention_mask)
    square = torch.logsumexp(logits, dim=-1, keepdim=True).square()  # (layers, batch, seq, 1)
    return (square * counts).sum() / counts.sum().clamp_min(1.0)


# ---- one object a strategy ----


@dataclass(frozen=True)
class TopKRouting:
    """``routing_strategy="top_k"``: see `route_top_k` and `load_balancing_loss`.

    Attributes:
        k: experts per token.
        weights_sum_to_one: whether a token's weights do.
        needs_token_mask: whether routing in training depends on what is padding.
    """

    k: int
    weights_sum_to_one: ClassVar[bool] = True
    needs_token_mask: ClassVar[bool] = False

    def route(
        self, logits: Tensor, leading_shape: Sequence[int], training: bool, token_mask: Tensor | None = None
    ) -> Routes:
        """Return `Routes` of the tokens with these logits, (tokens, experts), fp32. In `training` a capacity counts.

        In the call the tokens have the shape `leading_shape`, which ends with the sequence. `token_mask`: 0 on padding.
        """
        return Routes(*route_top_k(logits, self.k))

    def losses(self, layers: Sequence[Tensor], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        """{"aux_loss": scalar} of the router logits of each layer, and "z_loss" where the strategy has one."""
        return {"aux_loss": load_balancing_loss(layers, self.k, attention_mask)}


@dataclass(frozen=True)
class ArrowRouting(TopKRouting):
    """``routing_strategy="arrow"``: `TopKRouting` of `similarities`."""

    temperature: float = 1.0

    def similarities(self, products: Tensor) -> Tensor:
        """|router x| / temperature, which takes the place of the logits, from router x, (tokens, experts)."""
        return products.abs() / self.temperature


@dataclass(frozen=True)
class TopPRouting:
    """``routing_strategy="top_p"``: see `route_top_p` and `top_p_balancing_loss`; methods as in `TopKRouting`."""

    top_p: float
    temperature: float = 0.0
    weights_sum_to_one: ClassVar[bool] = False
    needs_token_mask: ClassVar[bool] = False

    def route(self, logits: Tensor, *context: Any) -> Routes:
        return Routes(*route_top_p(logits, self.top_p, self.temperature))

    def losses(self, layers: Sequence[Tensor], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"aux_loss": top_p_balancing_loss(layers, self.top_p, self.temperature, attention_mask)}


@dataclass(frozen=True)
class SwitchRouting:
    """``routing_strategy="switch"``: see `route_switch`, `load_balancing_loss` and `router_z_loss`."""

    capacity: int
    weights_sum_to_one: ClassVar[bool] = False
    needs_token_mask: ClassVar[bool] = True  # in training

    def route(
        self, logits: Tensor, leading_shape: Sequence[int], training: bool, token_mask: Tensor | None = None
    ) -> Routes:
        if not training:
            probability, selected, _ = route_switch(logits)
            return Routes(probability.unsqueeze(-1), selected.unsqueeze(-1))
        logits = logits.view(*leading_shape, -1)
        found: Any = route_switch(logits, self.capacity, token_mask)
        probability, selected, kept = (tensor.reshape(-1, 1) for tensor in found)
        passed = probability.masked_fill(kept, 0.0)
        return Routes(probability.masked_fill(~kept, 0.0), selected, kept, passed)

    def losses(self, layers: Sequence[Tensor], attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {
            "aux_loss": load_balancing_loss(layers, 1, attention_mask),
            "z_loss": router_z_loss(layers, attention_mask),
        }


Routing = TopKRouting | TopPRouting | SwitchRouting


def routing_of(config: Any) -> Routing:
    """The routing that a `MixLoraConfig` describes."""
    if config.routing_strategy == "top_k":
        return TopKRouting(config.num_experts_per_tok)
    if config.routing_strategy == "arrow":
        return ArrowRouting(config.num_experts_per_tok, config.router_temperature)
    if config.routing_strategy == "top_p":
        return TopPRouting(config.router_top_p, config.router_temperature)
    return SwitchRouting(config.expert_capacity)


def router_loss_weights(config: Any) -> dict[str, float]:
    """{name of a loss as in `TopKRouting.losses`: its weight in training}, without those whose weight is 0."""
    weights = {"aux_loss": config.router_aux_loss_coef, "z_loss": config.router_z_loss_coef}
    return {name: weight for name, weight in weights.items() if weight}


def router_losses(record: RoutingRecord, routing: Routing, trained: bool) -> dict[str, Tensor]:
    """The losses of a recorded forward that has ended, as in `TopKRouting.losses`; padding does not count.

    Routers over different numbers of experts have losses apart: the result is their mean, by the number of routers.

    Raises:
        ValueError: nothing was recorded, or the logits of routers that are `trained` have no gradient: checkpointing
            has hidden them.
    """
    if not record.logits:
        raise ValueError("torch.compile and gradient checkpointing together hide the router from its losses: use one")
    if trained and not record.logits[0].requires_grad:
        raise ValueError(
            "gradient checkpointing with use_reentrant=True hides the router from the balance loss: "
            'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
    mask = record.token_mask
    if mask is not None:
        mask = mask[:, -record.logits[0].shape[1] :]  # with a cache the mask also covers the past
    by_experts: dict[int, list[Tensor]] = {}
    for logits in record.logits:
        by_experts.setdefault(logits.shape[-1], []).append(logits)
    total: dict[str, Tensor] = {}
    for layers in by_experts.values():
        for name, loss in routing.losses(layers, mask).items():
            part = loss * (len(layers) / len(record.logits))
            total[name] = total[name] + part.to(total[name].device) if name in total else part
    return total
