"""Train PEFT's own methods in the same loop, and save them in PEFT's format.

Some methods need more than PEFT provides:

    PiSSA     changes the base's weights, so the difference from the initial state is saved: a LoRA of twice the rank
    LoftQ     is computed on any device and for any alpha (PEFT 0.21 requires CUDA and alpha = r)
    AdaLoRA   needs the number of steps, and each step's gradients; its importance scores are checkpointed, and the
              result is saved as the LoRA that it is: with the ranks that are left
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model, get_peft_model_state_dict
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import Linear4bit
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from minilora_hub.adapter_folder.names import PEFT_CONFIG, WEIGHTS
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import TrainingError
from minilora_hub.remote_code.layer_stacks import find_decoder_layers
from minilora_hub.remote_code.linear_layers import keep_4bit_weights_exact
from minilora_hub.training.recipes import peft_config_class
from minilora_hub.training.settings import TrainingSettings

UNSCHEDULED = 10**9
"""Placeholder for AdaLoRA's total number of steps, which is not known yet; `method_callbacks` replaces it."""


def build_peft_model(settings: TrainingSettings, resolved: ResolvedBase, arguments: dict[str, Any]) -> Any:
    """Load the base and add a new PEFT adapter, whose initial weights follow from the seed.

    Raises:
        BaseModelError: the base cannot be loaded.
        ValueError: PEFT rejects the configuration or the base.
    """
    base = load_base(resolved, **arguments)
    keep_4bit_weights_exact(base)
    chosen = dict(settings.recipe.adapter)
    config_class = peft_config_class(chosen)
    fields = {name: value for name, value in chosen.items() if name != "peft_type"}
    if "total_step" in {field.name for field in dataclasses.fields(config_class)}:
        fields["total_step"] = UNSCHEDULED
    set_seed(settings.recipe.seed)
    model = get_peft_model(base, config_class(task_type=TaskType.CAUSAL_LM, **fields))
    if settings.method == "loftq":
        compensate_rounding(model, resolved)
    if _is_pissa(settings):
        initial = get_peft_model_state_dict(model)
        model.initial_weights = {name: value.detach().clone() for name, value in initial.items()}
    return model


def _is_pissa(settings: TrainingSettings) -> bool:
    return str(settings.recipe.adapter.get("init_lora_weights", "")).startswith("pissa")


def compensate_rounding(model: Any, resolved: ResolvedBase) -> None:
    """Initialise LoftQ (arXiv 2310.08659, one iteration): s B A is the best rank-r part of W - Q of each 4-bit linear.

    Args:
        model: a PEFT LoRA model on an NF4 base.
        resolved: the base, whose exact weights are read.

    Raises:
        TrainingError: the base has no 4-bit linear.
    """
    import bitsandbytes as bnb

    exact = load_base(resolved, dtype="auto")
    layers = {name: module for name, module in model.get_base_model().named_modules() if isinstance(module, Linear4bit)}
    if not layers:
        raise TrainingError(f"LoftQ: base {resolved.name!r} has no 4-bit linear once it is quantised")
    for name, layer in layers.items():
        (adapter,) = layer.lora_A.keys()
        quantized = layer.base_layer.weight
        rounded = bnb.functional.dequantize_4bit(quantized.data, quantized.quant_state).float()
        residual = exact.get_submodule(name).weight.to(rounded.device).float() - rounded  # (out, in)
        left, values, right = torch.linalg.svd(residual, full_matrices=False)
        rank = layer.r[adapter]
        root = (values[:rank] / layer.scaling[adapter]).sqrt()
        with torch.no_grad():
            layer.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
            layer.lora_B[adapter].weight.copy_(left[:, :rank] * root)


def save_peft_adapter(model: Any, out: Path, settings: TrainingSettings, resolved: ResolvedBase) -> None:
    """Write the adapter in PEFT's format, naming the base by its name and commit."""
    out.mkdir(parents=True, exist_ok=True)
    if settings.method == "adalora":
        config, tensors = adalora_as_lora(model, settings, resolved)
        config.save_pretrained(str(out))
        save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
        model.get_base_model().generation_config.save_pretrained(out)
        return
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = settings.base, resolved.revision
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        conversion = {}
        if _is_pissa(settings):
            initial = Path(scratch, "initial")
            initial.mkdir()
            values = {name: value.contiguous() for name, value in model.initial_weights.items()}
            save_file(values, initial / WEIGHTS)
            conversion["path_initial_model_for_weight_conversion"] = str(initial)
        saved = Path(scratch, "saved")
        model.save_pretrained(str(saved), **conversion)
        for name in (PEFT_CONFIG, WEIGHTS):
            (saved / name).replace(out / name)  # not the card that PEFT writes: a push writes its own
    model.get_base_model().generation_config.save_pretrained(out)


@torch.no_grad()
def adalora_as_lora(
    model: Any, settings: TrainingSettings, resolved: ResolvedBase
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return an AdaLoRA as a LoRA: PEFT's configuration and tensors.

    Its update is P diag(e) Q * alpha / r (arXiv 2303.10512, eq. 3), where a pruned rank has e = 0. So B = P and
    A = diag(e) Q * alpha / r of the ranks that are left, with a scaling of 1.

    Raises:
        TrainingError: no rank is left.
    """
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    layers_path, _ = find_decoder_layers(model.get_base_model())
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, AdaLoraLayer):
            layer: Any = module
            (adapter,) = layer.lora_E.keys()
            e = layer.lora_E[adapter]  # (r, 1)
            left = e.flatten() != 0
            if left.any():
                scaling = layer.scaling[adapter] / (layer.ranknum[adapter] + 1e-5)  # as PEFT's forward has it
                key = f"base_model.model.{path}"
                tensors[f"{key}.lora_A.weight"] = (layer.lora_A[adapter] * e * scaling)[left].cpu().contiguous()
                tensors[f"{key}.lora_B.weight"] = layer.lora_B[adapter][:, left].cpu().contiguous()
                # Patterns of ranks name a linear by its place in the layers.
                ranks[f"{layers_path.rpartition('.')[2]}{path.removeprefix(layers_path)}"] = int(left.sum())
    if not ranks:
        raise TrainingError("AdaLoRA has pruned every rank: raise target_r")
    most = max(ranks.values())
    patterns = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=most,
        lora_alpha=most,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=sorted(ranks),
        fan_in_fan_out=model.peft_config["default"].fan_in_fan_out,
        base_model_name_or_path=settings.base,
        revision=resolved.revision,
        inference_mode=True,
    )
    return config, tensors


def method_callbacks(model: Any, steps: int) -> list[Any]:
    """Return the trainer callbacks that a method needs.

    Raises:
        TrainingError: AdaLoRA's schedule does not fit the number of steps.
    """
    config = model.peft_config["default"]
    if not hasattr(config, "total_step"):
        return []
    if not (config.tinit or config.tfinal):
        config.tinit, config.tfinal = steps // 10, steps // 3
    if config.tinit >= steps - config.tfinal:
        raise TrainingError(
            f"tinit={config.tinit} and tfinal={config.tfinal} leave none of the {steps} steps for reducing ranks: "
            "lower them, or train longer"
        )
    config.total_step = steps
    return [RanksAllocated()]


class RanksAllocated(TrainerCallback):
    """Passes AdaLoRA the gradients of each step before they are reset."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def allocation_state(model: Any) -> dict[str, Any]:
    """Return AdaLoRA's current importance scores and ranks for a checkpoint; empty for other methods."""
    allocator = getattr(getattr(model, "base_model", None), "rankallocator", None)
    if allocator is None:
        return {}
    kept = {f"{kind}/{name}": value for kind in SCORES for name, value in getattr(allocator, kind).items()}
    ranks = allocator.peft_config.rank_pattern or {}
    return kept | {f"ranks/{name}": torch.tensor(mask, dtype=torch.float32) for name, mask in ranks.items()}


def restore_allocation_state(model: Any, tensors: dict[str, Any]) -> None:
    """Restore the scores and ranks that `allocation_state` returned."""
    allocator = model.base_model.rankallocator
    found: dict[str, dict[str, Any]] = {kind: {} for kind in (*SCORES, "ranks")}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        found[kind][name] = value
    for kind in SCORES:
        setattr(allocator, kind, found[kind])
    if found["ranks"]:
        masks = {name: mask.bool().tolist() for name, mask in found["ranks"].items()}
        allocator.peft_config.rank_pattern = masks
