"""MixLoRAs and LoRAs in PEFT models, whose every tensor matters."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_base

from minilora_hub import MixLoraPeftConfig

STRATEGIES = ("mixlora", "mixlora-dynamic", "mixlora-switch")


def mixlora(**fields) -> MixLoraPeftConfig:
    return MixLoraPeftConfig(**({"r": 4, "num_experts": 4, "task_type": "CAUSAL_LM"} | fields))


def lora(**fields) -> LoraConfig:
    return LoraConfig(**({"r": 3, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | fields))


def fill(model, name: str = "default", seed: int = 1, scale: float = 0.2) -> None:
    """Random values in every tensor of one adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                if "magnitude" in key:
                    parameter.mul_(1 + noise)
                else:
                    parameter.copy_(noise * (5 if key.endswith("router") else 1))


def peft_model(config=None, *, name: str = "default", seed: int = 1, base=None, **fields) -> PeftModel:
    """A filled MixLoRA (or what `config` says) on a tiny base, in eval mode."""
    model = get_peft_model(base or tiny_base(), config or mixlora(**fields), adapter_name=name)
    fill(model, name, seed)
    return model.eval()


def adapter_tensors(model, name: str = "default") -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if f".{name}." in key}
