"""One adapter of every kind on a tiny base, and what runs them in a bank."""

from __future__ import annotations

import tiny
import torch
from peft import LoraConfig, get_peft_model

from minilora_hub.compare.adapter_bank import AdapterBank

PEFT_SETTINGS = {
    "lora": {"r": 4, "target_modules": "all-linear"},
    "rslora": {"r": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\..*up_proj": 6},
        "alpha_pattern": {"self_attn.q_proj": 3},
    },
    "one-layer": {"r": 2, "target_modules": ["o_proj"], "layers_to_transform": [1]},
    "peft-dora": {"r": 4, "use_dora": True, "target_modules": ["k_proj", "gate_proj"]},
}


def random_peft(family: str, name: str):
    """One of PEFT's own adapters on a tiny base, every tensor random."""
    settings = {"lora_alpha": 8, "task_type": "CAUSAL_LM", **PEFT_SETTINGS[name]}
    model = get_peft_model(tiny.tiny_base(family), LoraConfig(**settings)).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.mul_(1 + noise) if "magnitude" in key else parameter.copy_(noise)
    return model


def make_models(family: str = "llama") -> dict[str, torch.nn.Module]:
    """Adapters of every kind, alone on a base of their own."""
    small = {"target_modules": ["down_proj", "o_proj"]} if family == "llama" else {}
    models = {
        "dora": tiny.tiny_model(family, "dora"),
        "dora-small": tiny.tiny_model(family, "dora", r=2, **small),
        "mix": tiny.tiny_model(family, "mixlora"),
        "mix-3": tiny.tiny_model(family, "mixlora", r=3, num_experts=5, num_experts_per_tok=3),
        "mixdora": tiny.tiny_model(family, "mixdora"),
        "mix-top-p": tiny.tiny_model(family, "mixlora", routing_strategy="top_p", router_top_p=0.6),
        "mix-switch": tiny.tiny_model(
            family, "mixlora", routing_strategy="switch", expert_capacity=2, router_sparse_step=2
        ),
        "mix-linears": tiny.tiny_model(family, "mixlora", router_scope="linear", num_experts=[2, 5]),
    }
    if family == "llama":
        models |= {name: random_peft(family, name) for name in PEFT_SETTINGS}
    return {None: tiny.tiny_base(family), **{name: model.eval() for name, model in models.items()}}


@torch.no_grad()
def run(bank: AdapterBank, names, ids, **arguments):
    """Logits of one forward, with a row a name."""
    with bank.use(names), bank.rows(names):
        return bank.model(ids, **arguments).logits


def different_prompts(count: int, length: int = 9) -> torch.Tensor:
    return torch.stack([tiny.token_ids(1, length, seed=row)[0] for row in range(count)])
