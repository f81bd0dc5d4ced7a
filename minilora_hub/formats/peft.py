"""Write adapters in PEFT's format: adapter_config.json, and tensors under PEFT's names."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.folders import refuse_lfs_pointer, write_json
from minilora_hub.adapter_folder.names import PEFT_CONFIG, WEIGHTS, as_stock_transformers_reads, is_update, to_peft
from minilora_hub.errors import AdapterError
from minilora_hub.formats.targets import peft_target_names
from minilora_hub.hub.plain_files import read_header


def write_peft_config(folder: Path, config: dict[str, Any], base_id: str, base_revision: str | None) -> None:
    """Write adapter_config.json with the base's published name, sorted so that the file is reproducible.

    PEFT stores some fields as sets, whose order differs between processes.
    """
    config = config | {"base_model_name_or_path": base_id, "revision": base_revision, "inference_mode": True}
    # PEFT writes `auto_mapping`, a class to import, where the task is not given.
    config |= {"task_type": "CAUSAL_LM", "auto_mapping": None}
    ordered = {name: sorted(value) if isinstance(value, (set, tuple)) else value for name, value in config.items()}
    if isinstance(ordered.get("target_modules"), list):
        ordered["target_modules"] = sorted(ordered["target_modules"])
    write_json(folder / PEFT_CONFIG, ordered)


@dataclass(frozen=True)
class PeftTargets:
    """How PEFT finds the linears of an adapter in one base.

    Attributes:
        names: last parts of their paths, or whole paths; see `peft_target_names`.
        layers_path: path of the base's decoder layers, e.g. ``"model.layers"``.
        fan_in_fan_out: whether the linears store their weights transposed, as in GPT-2.
    """

    names: tuple[str, ...]
    layers_path: str
    fan_in_fan_out: bool = False


def peft_targets(sites: list[Any], base: Any) -> PeftTargets:
    """Return how PEFT finds the linears that a DoRA adapts.

    Args:
        sites: the linears.
        base: the base, or its structure without weights.
    """
    from minilora_hub.remote_code.layer_stacks import find_decoder_layers

    transposed = any(type(base.get_submodule(site.path)).__name__ == "Conv1D" for site in sites)
    return PeftTargets(tuple(peft_target_names(sites, base)), find_decoder_layers(base)[0], transposed)


def write_peft_folder(
    folder: Path,
    config: Any,
    tensors: dict[str, Any],
    targets: PeftTargets,
    base_id: str,
    base_revision: str | None,
) -> None:
    """Write a DoRA adapter for PEFT.

    Args:
        folder: the folder to write to.
        config: the adapter's DoraConfig.
        tensors: {canonical name: tensor}.
        targets: the linears it adapts.
        base_id: the base's id on the Hub.
        base_revision: its commit.

    Raises:
        AdapterError: it adapts stacked experts of the base.
    """
    from minilora_hub.remote_code.adapter_files import write_adapter

    if config.target_parameters:
        raise AdapterError(
            f"target_parameters={config.target_parameters}: PEFT has no DoRA on the parameters of stacked experts; "
            "--to dense merges it into its base"
        )

    folder.mkdir(exist_ok=True)
    fields = lora_settings(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=True,
        target_modules=list(targets.names),
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        fan_in_fan_out=targets.fan_in_fan_out,
    )
    write_peft_config(folder, fields, base_id, base_revision)
    renamed = {to_peft(name, targets.layers_path): tensor.cpu() for name, tensor in tensors.items()}
    write_adapter(folder / WEIGHTS, renamed)


def lora_settings(**settings: Any) -> dict[str, Any]:
    """Return the fields of PEFT's LoraConfig with these settings, as its adapter_config.json has them."""
    from peft import LoraConfig, TaskType

    fields = LoraConfig(task_type=TaskType.CAUSAL_LM, **settings).to_dict()
    return {name: getattr(value, "value", value) for name, value in fields.items()}


def copy_peft_weights(source: Path, out: Path) -> None:
    """Copy adapter_model.safetensors, without the base's own weights that PEFT saves beside an adapter on the head.

    Magnitudes that stock transformers would not find are renamed.
    """
    from minilora_hub.remote_code.adapter_files import read_adapter, write_adapter

    refuse_lfs_pointer(source / WEIGHTS)
    names = read_header(source / WEIGHTS)[0].keys() - {"__metadata__"}
    if all(is_update(name) and as_stock_transformers_reads(name) == name for name in names):
        shutil.copyfile(source / WEIGHTS, out / WEIGHTS)
        return
    tensors = read_adapter(source / WEIGHTS)
    kept = {as_stock_transformers_reads(name): tensor for name, tensor in tensors.items() if is_update(name)}
    write_adapter(out / WEIGHTS, kept)


def with_peft(base: Any, folder: Path) -> Any:
    """Load an adapter in PEFT's format onto `base`. Missing tensors, for which PEFT only warns, are an error.

    Raises:
        ValueError: a tensor is missing, or the file does not fit.
    """
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's own use of transformers
        try:
            return PeftModel.from_pretrained(base, str(folder)).eval()
        except Warning as warning:
            raise ValueError(f"{WEIGHTS}: {warning}") from warning
