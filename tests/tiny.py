"""Tiny random base models of each family, and adapters whose every tensor matters."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from minilora_hub import DoraConfig, DoraForCausalLM, DoraModel, MixLoraConfig, MixLoraForCausalLM, MixLoraModel
from minilora_hub.remote_code.mixture import MixtureOfLoraExperts

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "phi")
OTHER_FAMILIES = ("gpt_neox", "gpt2", "olmo2", "granite")
METHODS = ("dora", "mixlora", "mixdora")
CAUSAL_LM = {"dora": DoraForCausalLM, "mixlora": MixLoraForCausalLM, "mixdora": MixLoraForCausalLM}
HEADLESS = {"dora": DoraModel, "mixlora": MixLoraModel, "mixdora": MixLoraModel}
VOCABULARY = 128
# The name of the key/value cache in arguments and outputs: transformers 5.24 renamed it.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
TOP_P = {"routing_strategy": "top_p"}
SWITCH = {"routing_strategy": "switch", "expert_capacity": 3, "router_jitter_noise": 0.0}


def tiny_base(
    family: str = "llama", *, head: bool = True, biases: bool = False, seed: int = 0, **changes
) -> PreTrainedModel:
    """A random base in eval mode. `biases` fills every bias the family has (and asks for those it may have)."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,  # large enough for every weight to show in the logits
    }
    if family == "gemma2":
        fields |= {"head_dim": 256, "num_key_value_heads": 1}
    if family in ("phi", "gpt_neox", "gpt2"):
        del fields["num_key_value_heads"]
    if biases and family in ("llama", "qwen3", "granite", "olmo2"):
        fields |= {"attention_bias": True} | ({"mlp_bias": True} if family in ("llama", "granite") else {})
    torch.manual_seed(seed)
    auto = AutoModelForCausalLM if head else AutoModel
    base = auto.from_config(AutoConfig.for_model(family, **(fields | changes))).eval()
    if biases:
        with torch.no_grad():
            for name, parameter in base.named_parameters():
                if name.endswith(".bias"):
                    parameter.normal_(0, 0.5)
    return base


def tiny_config(method: str, **changes) -> DoraConfig | MixLoraConfig:
    if method == "dora":
        return DoraConfig(**({"r": 4} | changes))
    return MixLoraConfig(**({"r": 4, "num_experts": 4, "use_dora": method == "mixdora"} | changes))


def fill_adapter(model, seed: int = 1, scale: float = 0.2) -> None:
    """Random values in every adapter tensor, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            noise = torch.randn(parameter.shape, generator=generator) * scale
            if name.endswith("magnitude"):
                parameter.mul_(1 + noise)
            else:
                parameter.copy_(noise if not name.endswith("router") else noise * 5)


def tiny_model(family: str = "llama", method: str = "dora", *, filled: bool = True, head: bool = True, **changes):
    """An adapted tiny model. `changes` go to the adapter's configuration."""
    classes = CAUSAL_LM if head else HEADLESS
    model = classes[method].from_base(tiny_base(family, head=head), tiny_config(method, **changes))
    if filled:
        fill_adapter(model)
    return model


def token_ids(batch: int = 2, length: int = 9, seed: int = 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids: torch.Tensor | None = None, **arguments) -> torch.Tensor:
    outputs = model(token_ids() if ids is None else ids, **arguments)
    return outputs.logits if "logits" in outputs else outputs.last_hidden_state


def mixtures(model) -> list[MixtureOfLoraExperts]:
    return [module for module in model.modules() if isinstance(module, MixtureOfLoraExperts)]


def padded(ids: torch.Tensor, side: str, amount: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask) with `amount` padding tokens on one side."""
    padding = torch.zeros(ids.shape[0], amount, dtype=torch.long)
    parts = (padding, ids) if side == "left" else (ids, padding)
    masks = (padding, torch.ones_like(ids)) if side == "left" else (torch.ones_like(ids), padding)
    return torch.cat(parts, dim=1), torch.cat(masks, dim=1)
