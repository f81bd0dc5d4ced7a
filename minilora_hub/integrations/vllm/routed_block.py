"""A feed-forward block of vLLM in which the tokens of MixLoRA adapters take their own experts.

The base's linears are computed once for all rows of the batch. Then each MixLoRA in the batch adds the low-rank parts
of its experts to its own rows, with the same code as in transformers (`MixtureOfLoraExperts.expand` and `combine`).
Other rows cost nothing more. The rows of an adapter are selected in Python for each batch, so the block cannot be
compiled: it needs ``--enforce-eager``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilora_hub.integrations.vllm.lora_layers import Batch

KNOWN_BLOCKS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "GraniteMLP")
"""Classes of vLLM whose forward is down_proj(act_fn(gate_up_proj(x)))."""


class RoutedBlock(nn.Module):
    """A feed-forward block with the adapters of the batch: (tokens, d) -> (tokens, d).

    Args:
        block: vLLM's own block, whose layers are used.
        name: the block's path in the model.
        batch: the current batch.
    """

    def __init__(self, block: Any, name: str, batch: Batch) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = block.gate_up_proj, block.down_proj, block.act_fn
        self.name, self.batch = name, batch

    def forward(self, x: Tensor) -> Tensor:
        projected, _ = self.gate_up_proj(x)  # (tokens, 2 ff)
        hidden = self.act_fn(projected)  # (tokens, ff)
        routed = []
        for tokens, mixtures in self.batch.routed:
            mixture = mixtures.get(self.name)
            if mixture is not None:
                shared = projected[tokens].chunk(2, dim=-1)  # gate and up, each (tokens of the adapter, ff)
                routes = mixture.expand(x[tokens], shared, tokens.shape)
                hidden[tokens] = routes.hidden.to(hidden.dtype)
                routed.append((tokens, mixture, routes))
        out, _ = self.down_proj(hidden)  # (tokens, d)
        for tokens, mixture, routes in routed:
            out[tokens] = mixture.combine(out[tokens], routes).to(out.dtype)
        return out


def install_blocks(model: Any, batch: Batch) -> list[str]:
    """Replace every feed-forward block of a known class with a `RoutedBlock`; return their paths."""
    found = [(name, module) for name, module in model.named_modules() if type(module).__name__ in KNOWN_BLOCKS]
    for name, block in found:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, RoutedBlock(block, name, batch))
    return [name for name, _ in found]


def rows_of(adapter: int, token_adapters: tuple[int, ...], device: Any) -> Tensor:
    """Return the indices of an adapter's tokens in a batch.

    Args:
        adapter: the adapter's number.
        token_adapters: the number of the adapter of each token.
        device: device of the result.
    """
    return torch.tensor([row for row, one in enumerate(token_adapters) if one == adapter], device=device)
