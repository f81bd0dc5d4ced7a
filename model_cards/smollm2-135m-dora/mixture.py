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
expert multiplies one contiguous block; few slots gather the experts' stacked weights instead.
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
    """Softmax over the experts, the k largest, divided by their sum: which is the softmax of the k largest logits.

    Args:
        logits: (tokens, experts), fp32.
        k: experts per token.

    Returns:
        weights (tokens, k), fp32, and indices (tokens, k), the largest first.
    """
    largest, selected = torch.topk(logits, k, dim=-1)
    return F.softmax(largest, dim=-1), selected


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
    """Slots sorted by expert: each expert that serves any multiplies one contiguous block, with its own weights.

    Attributes:
        token: the token of each slot, (slots).
        expert: the expert of each slot, (slots).
    """

    def __init__(self, selected):
        flat = selected.flatten()
        if selected.shape[0] == 1:  # one token: its experts are all different, nothing to sort
            self.order, self.expert = None, flat
            self.token = torch.zeros_like(flat)
            self.experts, self.counts = flat.tolist(), [1] * flat.shape[0]
            return
        self.expert, self.order = flat.sort(stable=True)
        self.token = self.order // selected.shape[1]
        served, counts = torch.unique_consecutive(self.expert, return_counts=True)
        self.experts, self.counts = served.tolist(), counts.tolist()

    def slots(self, per_slot):
        """(tokens, K) -> (slots, 1) in this order."""
        flat = per_slot.flatten()
        return (flat if self.order is None else flat[self.order]).unsqueeze(-1)

    def _blocks(self, *tensors):
        return zip(*(tensor.split(self.counts) for tensor in tensors), strict=True)

    def _weights(self, stacked):
        # With gradients unbind, not indexing: its backward is one stack, and an expert without tokens gets zeros.
        parts = stacked.unbind() if torch.is_grad_enabled() else stacked
        return [parts[expert] for expert in self.experts]

    def project_down(self, x, lora_a):
        """A_e x: (slots, in) -> (slots, r)."""
        parts = [F.linear(rows, a) for (rows,), a in zip(self._blocks(x), self._weights(lora_a), strict=True)]
        return torch.cat(parts)

    def add_projected_up(self, out, hidden, lora_b, scaling):
        """out + s B_e hidden: (slots, r) -> (slots, out). Without gradients `out` itself is written to."""
        blocks = zip(self._blocks(out, hidden), self._weights(lora_b), strict=True)
        if not out.dtype == hidden.dtype == lora_b.dtype:
            return torch.cat([o + (F.linear(h, b) * scaling).to(o.dtype) for (o, h), b in blocks])
        if torch.is_grad_enabled():
            return torch.cat([torch.addmm(o, h, b.mT, alpha=scaling) for (o, h), b in blocks])
        for (o, h), b in blocks:
            o.addmm_(h, b.mT, alpha=scaling)
        return out

    def sum_slots(self, per_slot, num_tokens):
        """Sum each token's slots: (slots, n) -> (tokens, n)."""
        if num_tokens == 1:
            return per_slot.sum(dim=0, keepdim=True)
        return per_slot.new_zeros(num_tokens, per_slot.shape[-1]).index_add(0, self.token, per_slot)


class _SlotsGathered:
    """Slots in token order, each with its own expert's weights gathered, so that nothing waits for the device."""

    def __init__(self, selected):
        self.expert = selected.flatten()  # (slots)
        self.per_token = selected.shape[1]
        self.token = torch.arange(selected.shape[0], device=selected.device).repeat_interleave(self.per_token)

    def slots(self, per_slot):
        return per_slot.flatten().unsqueeze(-1)

    def project_down(self, x, lora_a):
        return torch.bmm(lora_a[self.expert], x.unsqueeze(-1)).squeeze(-1)

    def add_projected_up(self, out, hidden, lora_b, scaling):
        update = torch.bmm(lora_b[self.expert], hidden.unsqueeze(-1)).squeeze(-1)
        return torch.add(out, update.to(out.dtype), alpha=scaling)

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
        slots = self._group(selected)
        # One base GEMM per input projection, whatever the number of experts.
        shared = [self._project(name, x)[slots.token] for name in self.structure.inputs]  # each (slots, out)
        h = self.structure.activate(*self._expert_inputs(shared, x[slots.token], slots))  # (slots, ff)
        g = slots.slots(weights).to(x.dtype)
        h = h * g if torch.is_grad_enabled() else h.mul_(g)  # g_k h_k
        out = self._expert_output(h, slots, x.shape[0])  # (tokens, d)
        return self.structure.dropout(out).view_as(hidden_states)

    def _group(self, selected):
        """A CPU reads indices for free; elsewhere that waits for the device, which few tokens are spared."""
        few = selected.numel() <= self.router.shape[0]
        if torch.compiler.is_compiling() or (few and selected.device.type != "cpu"):
            return _SlotsGathered(selected)
        return _SlotsByExpert(selected)

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

    def _expert_inputs(self, shared, x, slots):
        """The input projections of every slot: shared W x + b, and the slot's expert. Lists of (slots, out)."""
        experts = dict(self.experts.items())
        updates = [experts.get(name) for name in self.structure.inputs]
        many = x.shape[0] > self.router.shape[0]
        if many and None not in updates and not (self.training and updates[0].dropout.p > 0):
            # The same input for all, so their A are one matrix, wide enough for the matrix library to be good at.
            stacked = torch.cat([update.lora_A for update in updates], dim=1)  # (experts, sum of r, d)
            hidden = slots.project_down(x.to(stacked.dtype), stacked)
            hidden = hidden.split([update.lora_A.shape[1] for update in updates], dim=-1)
        else:
            hidden = [None if update is None else self._project_down(update, x, slots) for update in updates]
        projected = []
        for name, out, update, low in zip(self.structure.inputs, shared, updates, hidden, strict=True):
            if update is not None:
                out = self._scaled(name, slots.add_projected_up(out, low, update.lora_B, update.scaling), slots)
            projected.append(out)
        return projected

    def _project_down(self, update, x, slots):
        x = update.dropout(x) if self.training else x
        return slots.project_down(x.to(update.lora_A.dtype), update.lora_A)

    def _expert_output(self, h, slots, num_tokens):
        """The output projection, summed over each token's slots. `h` (slots, ff) already carries its slot's weight."""
        name = self.structure.output
        if name not in self.experts:
            return self._project(name, slots.sum_slots(h, num_tokens))
        update = self.experts[name]
        low = self._project_down(update, h, slots)
        if update.magnitude is None:
            added = slots.add_projected_up(
                h.new_zeros(h.shape[0], update.lora_B.shape[1]), low, update.lora_B, update.scaling
            )
            return self._project(name, slots.sum_slots(h, num_tokens)) + slots.sum_slots(added, num_tokens)
        # g * (c * (W h + s B A h) + b): the weights sum to one, so the bias is left out of every slot and added once.
        layer = self.base_block.get_submodule(name)
        bias = getattr(layer, "bias", None)
        out = self._project(name, h)
        out = slots.add_projected_up(out if bias is None else out - bias, low, update.lora_B, update.scaling)
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
