"""MixLoRA's feed-forward block: a router, and LoRA experts over the one frozen block they share (arXiv 2404.15159).

For a token x with experts e_1 .. e_K and weights g_1 .. g_K (eq. 4 to 6 of the paper):

    g = softmax(router x)  ->  the K largest  ->  divided by their sum
    y = sum_k g_k * E_{e_k}(x),   E_e(x) = W_down' act(W_gate' x) * (W_up' x),   W' = W + s B_e A_e

How this differs from the reference: W_gate x and W_up x are the same for every expert, and W_down is linear, so

    sum_k g_k W_down h_k = W_down sum_k g_k h_k

and every base matrix multiplication runs once per token, as in the dense model; an expert adds its low-rank parts only.
With DoRA experts (`use_dora`) the per-expert output scale keeps W_down from being combined: there it runs once per
slot.

A slot is one (token, chosen expert) pair: N tokens have N * K slots. Many slots are sorted by expert, so that each
expert
multiplies one contiguous block; few slots gather the experts' stacked weights instead.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from .adapted_linear import apply_dora_scale

_RECORD = ContextVar("minilora_routing_record", default=None)
_COMPILED_RECORD = [None]  # torch.compile cannot trace a ContextVar; a compiled forward runs in one thread


@dataclass
class RoutingRecord:
    """What the routers of one forward decided, a tensor a layer, in the order of the layers.

    Attributes:
        logits: router logits, (batch, seq, experts), fp32.
        selected: indices of the chosen experts, (batch, seq, K).
        weights: their weights, (batch, seq, K), fp32.
    """

    logits: list = field(default_factory=list)
    selected: list = field(default_factory=list)
    weights: list = field(default_factory=list)


@contextmanager
def record_routing():
    """Collect the routing of every mixture that runs inside: ``with record_routing() as record: model(...)``.

    The record belongs to this thread's context, and is closed when the block ends, so a forward that gradient
    checkpointing repeats during backward adds nothing to it.
    """
    record = RoutingRecord()
    if torch.compiler.is_compiling():
        _COMPILED_RECORD[0] = record
        try:
            yield record
        finally:
            _COMPILED_RECORD[0] = None
    else:
        token = _RECORD.set(record)
        try:
            yield record
        finally:
            _RECORD.reset(token)


def current_record():
    """The open record of this context, or None."""
    return _COMPILED_RECORD[0] if torch.compiler.is_compiling() else _RECORD.get()


def route_top_k(logits, k):
    """Softmax over the experts, the k largest, divided by their sum.

    Args:
        logits: (tokens, experts), fp32.
        k: experts per token.

    Returns:
        weights (tokens, k), fp32, and indices (tokens, k), the largest first.
    """
    weights, selected = torch.topk(F.softmax(logits, dim=-1), k, dim=-1)
    return weights / weights.sum(dim=-1, keepdim=True), selected


def load_balancing_loss(logits, k, attention_mask=None):
    """E * sum_i f_i P_i over the tokens of all layers (eq. 7 of the paper; the form that transformers' MoE models use).

    f_i is the share of tokens that chose expert i, summed over their k slots, P_i the mean probability of expert i.

    Args:
        logits: router logits, a tensor (batch, seq, experts) per layer.
        k: experts per token.
        attention_mask: (batch, seq), 0 on padding, which does not count. None: every token counts.

    Returns:
        A scalar, fp32; k when the load is perfectly even.
    """
    device = logits[0].device  # layers may lie on several
    logits = torch.stack([layer.to(device) for layer in logits])  # (layers, batch, seq, experts)
    probabilities = F.softmax(logits.float(), dim=-1)
    num_experts = probabilities.shape[-1]
    chosen = torch.topk(probabilities, k, dim=-1).indices
    chosen = F.one_hot(chosen, num_experts).sum(dim=-2).float()  # (layers, batch, seq, experts), k ones a token
    if attention_mask is None:
        counts = torch.ones(logits.shape[:-1], device=device)
    else:
        counts = attention_mask.to(device=device, dtype=torch.float32).expand(logits.shape[:-1])
    counts = counts.unsqueeze(-1)  # (layers, batch, seq, 1)
    total = counts.sum().clamp_min(1.0)
    share = (chosen * counts).sum(dim=(0, 1, 2)) / total  # f: (experts)
    mean_probability = (probabilities * counts).sum(dim=(0, 1, 2)) / total  # P: (experts)
    return num_experts * (share * mean_probability).sum()


class _SlotsByExpert:
    """Slots sorted by expert: each expert sees one contiguous block. For many tokens."""

    def __init__(self, selected, num_experts):
        self.order = selected.flatten().argsort(stable=True)  # (slots)
        self.token = self.order // selected.shape[1]
        self.expert = selected.flatten()[self.order]
        self.counts = torch.bincount(selected.flatten(), minlength=num_experts).tolist()

    def slots(self, per_slot):
        """(tokens, K) -> (slots, 1) in this order."""
        return per_slot.flatten()[self.order].unsqueeze(-1)

    def low_rank(self, x, update):
        """s B_e A_e x_e for x (slots, in) in this order -> (slots, out)."""
        # unbind, not indexing: its backward is one stack, and an expert without tokens gets a zero gradient.
        pieces = []
        experts = zip(x.split(self.counts), update.lora_A.unbind(), update.lora_B.unbind(), strict=True)
        for rows, lora_a, lora_b in experts:
            if rows.shape[0]:
                pieces.append(F.linear(F.linear(rows, lora_a), lora_b))
        return torch.cat(pieces) * update.scaling

    def sum_slots(self, per_slot, num_tokens):
        """Sum each token's slots: (slots, n) -> (tokens, n)."""
        zeros = per_slot.new_zeros(num_tokens, per_slot.shape[-1])
        return zeros.index_add(0, self.token, per_slot)


class _SlotsGathered:
    """Slots in token order, each with its own expert's weights gathered. For few tokens; never waits for the device."""

    def __init__(self, selected, num_experts):
        self.expert = selected.flatten()  # (slots)
        self.per_token = selected.shape[1]
        self.token = torch.arange(selected.shape[0], device=selected.device).repeat_interleave(self.per_token)

    def slots(self, per_slot):
        return per_slot.flatten().unsqueeze(-1)

    def low_rank(self, x, update):
        hidden = torch.bmm(update.lora_A[self.expert], x.unsqueeze(-1))  # (slots, r, 1)
        return torch.bmm(update.lora_B[self.expert], hidden).squeeze(-1) * update.scaling  # (slots, out)

    def sum_slots(self, per_slot, num_tokens):
        return per_slot.view(num_tokens, self.per_token, -1).sum(dim=1)


class MixtureOfLoraExperts(nn.Module):
    """A feed-forward block of the base with a router and LoRA experts over it: (batch, seq, d) -> (batch, seq, d).

    Args:
        base_block: the base's feed-forward module; its linears are called, never unpacked.
        structure: its `FeedForwardStructure`: which linears it has and what happens between them.
        router: router weight, [experts, d].
        experts: projection name -> `LowRankUpdate` stacked over the experts. A projection may be left out.
        num_experts_per_tok: K.
        jitter_noise: in training, the router's input is multiplied by U(1 - noise, 1 + noise).
    """

    def __init__(self, base_block, structure, router, experts, num_experts_per_tok, jitter_noise=0.0):
        super().__init__()
        self.base_block = base_block
        self.structure = structure
        self.router = nn.Parameter(router)
        self.experts = nn.ModuleDict(experts)
        self.num_experts_per_tok = num_experts_per_tok
        self.jitter_noise = jitter_noise

    def forward(self, hidden_states):
        x = hidden_states.flatten(0, -2)  # (tokens, d)
        weights, selected = self.route(x, hidden_states.shape[:-1])
        many = selected.numel() > self.router.shape[0]
        slots = (_SlotsByExpert if many else _SlotsGathered)(selected, self.router.shape[0])

        # One base GEMM per input projection, whatever the number of experts.
        x_slots = x[slots.token]  # (slots, d)
        projected = [
            self._expert_input(name, self._project(name, x)[slots.token], x_slots, slots)
            for name in self.structure.inputs
        ]
        h = self.structure.activate(*projected) * slots.slots(weights).to(x.dtype)  # (slots, ff): g_k h_k
        out = self._expert_output(h, slots, x.shape[0])  # (tokens, d)
        return self.structure.dropout(out).view_as(hidden_states)

    def route(self, x, leading_shape):
        """Weights and indices of each token's experts, (tokens, K) both; recorded where someone asked."""
        x = x.float()
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
        with torch.autocast(x.device.type, enabled=False):  # routing in fp32, as the reference does
            logits = F.linear(x, self.router.float())  # (tokens, experts)
            weights, selected = route_top_k(logits, self.num_experts_per_tok)
        record = current_record()
        if record is not None:
            record.logits.append(logits.view(*leading_shape, -1))
            record.selected.append(selected.view(*leading_shape, -1))
            record.weights.append(weights.view(*leading_shape, -1))
        return weights, selected

    def _project(self, name, x):
        return self.base_block.get_submodule(name)(x)

    def _low_rank(self, name, x, slots):
        update = self.experts[name]
        return slots.low_rank(update.dropout(x).to(update.lora_A.dtype), update).to(x.dtype)

    def _expert_input(self, name, shared, x_slots, slots):
        """One input projection of every slot: the shared W x + b and the slot's expert: (slots, out)."""
        if name not in self.experts:
            return shared
        out = shared + self._low_rank(name, x_slots, slots)
        return self._scaled(name, out, slots)

    def _expert_output(self, h, slots, num_tokens):
        """The output projection, summed over each token's slots. `h` (slots, ff) already carries its slot's weight."""
        name = self.structure.output
        if name not in self.experts:
            return self._project(name, slots.sum_slots(h, num_tokens))
        low_rank = self._low_rank(name, h, slots)
        if self.experts[name].magnitude is None:
            return self._project(name, slots.sum_slots(h, num_tokens)) + slots.sum_slots(low_rank, num_tokens)
        # g * (c * (W h + s B A h) + b): the weights sum to one, so the bias is left out of every slot and added once.
        layer = self.base_block.get_submodule(name)
        bias = getattr(layer, "bias", None)
        out = self._project(name, h)
        out = (out if bias is None else out - bias) + low_rank
        out = slots.sum_slots(self._scaled(name, out, slots, with_bias=False), num_tokens)
        return out if bias is None else out + bias

    def _scaled(self, name, out, slots, with_bias=True):
        """DoRA's c per slot; nothing for plain LoRA."""
        update = self.experts[name]
        if update.magnitude is None:
            return out
        layer = self.base_block.get_submodule(name)
        bias = getattr(layer, "bias", None) if with_bias else None
        return apply_dora_scale(out, update.scale(layer)[slots.expert], bias)
