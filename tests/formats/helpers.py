"""Adapters in every format, on tiny bases that lie in folders."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tiny import fill_adapter, tiny_base, tiny_config

from minilora_hub import MixLoraForCausalLM
from minilora_hub.adapter_folder.names import COMPANIONS
from minilora_hub.formats.exporting import export_adapter


def base_folder(folder: Path, family: str = "llama", **changes) -> Path:
    """A tiny base saved as a folder."""
    path = folder / "-".join([family, *(f"{key}-{value}" for key, value in changes.items())]).replace("/", "_")
    if not path.exists():
        tiny_base(family, **changes).save_pretrained(path)
    return path


def reference_folder(folder: Path, model, **changes) -> Path:
    """A MixLoRA of ours as the reference package writes it; written out here, apart from the code under test."""
    config, text = model.config, model.base.config
    folder.mkdir(parents=True)
    fields = {
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "bias": "none",
        "routing_strategy": "mixlora",
        "num_experts": config.num_experts,
        "top_k": config.num_experts_per_tok,
        "act_fn": getattr(text, "hidden_activation", None) or text.hidden_act,
        "r": config.r,
        "lora_alpha": int(config.lora_alpha),
        "lora_dropout": 0.05,
        "target_modules": sorted({name.split(".")[-2] for name in model.adapter_parameters() if "lora_A" in name}),
    } | changes
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    torch.save(reference_tensors(model), folder / "adapter_model.bin")
    return folder


def reference_tensors(model) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the reference's names."""
    weights = {}
    for name, parameter in model.adapter_parameters().items():
        tensor = parameter.detach()
        layer, *path, leaf = name.removeprefix("layers.").split(".")
        prefix = f"mixlora.layers.{layer}.{path[0]}"
        if leaf == "router":
            weights[f"{prefix}.moe_gate.weight"] = tensor.clone()
        elif "experts" in path:
            for expert, value in enumerate(tensor):
                weights[f"{prefix}.{path[2]}.experts.{expert}.{leaf}.weight"] = value.clone()
        elif leaf != "magnitude":
            weights[f"{prefix}.{path[1]}.{leaf}.weight"] = tensor.clone()
    return weights


def legacy_tensors(model) -> dict[str, torch.Tensor]:
    """The same under the names of the reference's older files (llama's projections only)."""
    old = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
    weights = {}
    for name, tensor in reference_tensors(model).items():
        parts = name.split(".")
        if "moe_gate" in parts:
            name = f"mixlora.layers.{parts[2]}.gate.weight"
        elif "experts" in parts:
            name = f"mixlora.layers.{parts[2]}.experts.{parts[6]}.{old[parts[4]]}.{parts[7]}.weight"
        weights[name] = tensor
    return weights


def mixlora(base, **changes):
    """A filled MixLoRA on a tiny base."""
    model = MixLoraForCausalLM.from_base(base, tiny_config("mixlora", **changes))
    fill_adapter(model)
    return model


def peft_folder(folder: Path, base, seed: int = 1, name: str | None = "org/base", **settings) -> Path:
    """A LoRA or DoRA as stock PEFT saves it, every tensor random. Takes over `base`."""
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    config = LoraConfig(task_type="CAUSAL_LM", **(fields | settings))
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_magnitude_vector" in key:
                parameter.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in key:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, save_embedding_layers=False)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=name)  # PEFT would ask the Hub about it
    model.unload()
    return folder


def edit_json(path: Path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def listing(folder: Path) -> set[str]:
    """Every path under a folder, hidden ones too: what a failure must leave as it was."""
    return {
        os.path.relpath(os.path.join(where, name), folder)
        for where, dirs, files in os.walk(folder)
        for name in dirs + files
    }


def peft_mixlora_folder(source, out):
    """A MixLoRA of ours in the layout of our PEFT method, without the base's tokenizer."""
    export_adapter(source, out, "peft")
    for name in COMPANIONS:
        (out / name).unlink(missing_ok=True)
    return out
