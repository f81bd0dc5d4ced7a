"""Reading LoRA and DoRA adapters in PEFT's format, tensor by tensor, without PEFT.

Where an adapter sits is read from the names of its tensors, and its rank from their shapes, so that every way in which
PEFT chooses modules (names, regular expressions, layers, exclusions) comes out right. What PEFT's LoRA can do beyond
LoRA, rsLoRA and DoRA changes the forward, and is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from torch import nn

from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft_reading import INITIALISED, REFUSED
from minilora_hub.remote_code.adapted_linear import linear_shape
from minilora_hub.remote_code.adapter_files import ADAPTER_FILE, check_tensors, read_adapter
from minilora_hub.remote_code.attach import expected_tensors
from minilora_hub.remote_code.base_structure import LinearSite, find_decoder_layers
from minilora_hub.remote_code.configuration_adapter import is_int, is_number, require, require_pattern
from minilora_hub.remote_code.configuration_minilora import DoraConfig
from minilora_hub.tensor_names import from_peft

PEFT_CONFIG_FILE = "adapter_config.json"


class PeftLoraConfig(DoraConfig):
    """PEFT's LoRA or DoRA in our terms; ranks and scalings are those of its own tensors, by canonical name."""

    def __init__(self, *, use_dora: bool = False, of_modules: dict[str, tuple[int, float]] | None = None, **kwargs):
        """`of_modules`: canonical name of a linear -> (rank, scaling)."""
        self.of_modules = of_modules or {}
        super().__init__(use_dora=True, **kwargs)
        self.use_dora = use_dora

    def rank_and_scaling(self, path: str, r: int, alpha: float) -> tuple[int, float]:
        """Rank and scaling of the linear at `path`."""
        return self.of_modules[path]


def read_peft_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json of a LoRA or DoRA.

    Raises:
        AdapterError: the file is missing or damaged, is of another method, or uses what goes beyond LoRA and DoRA.
    """
    path = folder / PEFT_CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"adapter {str(folder)!r}: no {PEFT_CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{str(path)!r}: must hold a JSON object")
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{str(path)!r}: peft_type={settings.get('peft_type')!r}, must be 'LORA'")
    for name in REFUSED:
        if settings.get(name):
            raise AdapterError(
                f"{str(path)!r}: {name}={settings[name]!r}: only plain LoRA, rsLoRA and DoRA can be read"
            )
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init not in INITIALISED:
        raise AdapterError(
            f"{str(path)!r}: init_lora_weights={init!r} changes the base's weights: convert the adapter to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
    try:
        _check_numbers(settings)
    except ValueError as error:
        raise AdapterError(f"{str(path)!r}: {error}") from None
    return settings


def _check_numbers(settings: dict[str, Any]) -> None:
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    require_pattern(ranks, "rank_pattern")
    require_pattern(alphas, "alpha_pattern")
    for name, rank in (("r", settings.get("r")), *((f"rank_pattern[{key!r}]", rank) for key, rank in ranks.items())):
        require(is_int(rank, 1), name, rank, "must be an integer of at least 1")
    every_alpha = (
        ("lora_alpha", settings.get("lora_alpha")),
        *((f"alpha_pattern[{k!r}]", v) for k, v in alphas.items()),
    )
    for name, alpha in every_alpha:
        require(is_number(alpha), name, alpha, "must be a finite number of at least 0")


def read_peft_lora(folder: Path, base: nn.Module) -> tuple[PeftLoraConfig, list[LinearSite], dict[str, Any]]:
    """Read a LoRA or DoRA for `base`, which is only looked at.

    Returns:
        The configuration, the linears it sits on, and {canonical name: tensor}.

    Raises:
        AdapterError: see `read_peft_config`.
        ValueError: a tensor is missing, surplus, misshapen or not finite, or has no place in the base; the message
            names it.
    """
    settings = read_peft_config(folder)
    layers_path, layers = find_decoder_layers(base)
    file = folder / ADAPTER_FILE
    if not file.is_file():
        raise AdapterError(f"adapter {str(folder)!r}: no {ADAPTER_FILE}")
    tensors = {from_peft(name, layers_path): tensor for name, tensor in read_adapter(file).items()}
    sites, of_modules = [], {}
    for name in sorted({name.rpartition(".")[0] for name in tensors}):
        _, _, path = name.partition("layers.")
        try:
            shape = linear_shape(layers.get_submodule(path))
        except AttributeError:
            shape = None
        if shape is None:
            raise ValueError(f"{file}: the base has no linear {layers_path}.{path}, for which the file has tensors")
        sites.append(LinearSite(name, f"{layers_path}.{path}", *shape))
        if f"{name}.lora_A" not in tensors:
            raise ValueError(f"{file} does not fit this configuration and base: missing {name}.lora_A")
        rank = tensors[f"{name}.lora_A"].shape[0]
        of_modules[name] = (rank, _scaling(settings, f"{layers_path}.{path}", rank))
    if not sites:
        raise ValueError(f"{file}: holds no tensors")
    config = PeftLoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
        of_modules=of_modules,
    )
    check_tensors(file, tensors, expected_tensors(config, sites))
    return config, sites, tensors


def _scaling(settings: dict[str, Any], path: str, rank: int) -> float:
    """alpha / r, with the alpha and the nominal rank that PEFT's patterns give the module at `path`."""
    nominal = _match(settings.get("rank_pattern") or {}, path, settings["r"])
    if nominal != rank:
        raise ValueError(f"{path}: lora_A has {rank} rows, the configuration says rank {nominal}")
    alpha = _match(settings.get("alpha_pattern") or {}, path, settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _match(pattern: dict[str, Any], path: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), default)
