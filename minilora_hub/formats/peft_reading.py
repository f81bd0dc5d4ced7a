"""LoRA, rsLoRA and DoRA adapters in PEFT's format, read strictly: what cannot be honoured is refused by name.

PEFT passes over settings that it does not know, and starts anew where a tensor is missing. Both change what the adapter
computes, so here both are errors.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import PEFT_CONFIG, PEFT_PREFIX, join_peft, split_peft
from minilora_hub.adapter_folder.reading import read_tensors
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.settings import Settings

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")

NUMBER = (int, float)
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
}
"""What a model that was saved inside of a wrapper has in the names of its tensors."""
REFUSED = {
    "alora_invocation_tokens": "an adapter that is on for a part of the text only",
    "arrow_config": "routing between adapters",
    "ensure_weight_tying": "tied adapters",
    "kasa_config": "KaSA",
    "layer_replication": "layers that the base has not",
    "lora_bias": "biases on lora_B",
    "megatron_config": "Megatron's parallel linears",
    "modules_to_save": "whole modules trained beside the adapter",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "updates of bare parameters",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its input",
    "velora_config": "VeLoRA",
}
"""What changes the result and has no place in our format or in the base alone: setting -> what it is."""
PASSED_OVER = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "unsloth_fixed",
}  # fmt: skip
"""Settings of training and bookkeeping, and those whose effect the tensors' names already tell."""
INITIALISED = ("gaussian", "orthogonal", "eva")
"""Ways to start training that leave the base as it is. PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ do not."""


@dataclass(frozen=True)
class Update:
    """One low-rank update: y = W x + s B A x.

    Attributes:
        lora_a: A, [r, in].
        lora_b: B, [out, r].
        scaling: s.
        magnitude: DoRA's m, [out]; None for LoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter in PEFT's format, checked against its base.

    Attributes:
        config: the settings that PEFT's LoraConfig takes, without those that are defaults or bookkeeping.
        updates: {path of the linear in the base: update}.
        base: the base.
    """

    config: dict[str, Any]
    updates: dict[str, Update]
    base: BaseSource

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors under PEFT's names."""
        found = {}
        for path, update in self.updates.items():
            found[join_peft(path, "lora_A")] = update.lora_a
            found[join_peft(path, "lora_B")] = update.lora_b
            if update.magnitude is not None:
                found[join_peft(path, "magnitude")] = update.magnitude
        return found


def read_peft(source: AdapterFolder, base: BaseSource) -> PeftAdapter:
    """Read a LoRA or DoRA in PEFT's format.

    Raises:
        AdapterError: a setting cannot be honoured, or a tensor is missing, surplus or misshapen.
    """
    from minilora_hub.remote_code.linear_layers import linear_shape

    config = read_settings(source)
    modules = dict(base.skeleton.named_modules())
    tensors_of_file = read_tensors(source.folder)
    _drop_base_copies(tensors_of_file, base)
    parts = split_tensors(tensors_of_file, config["use_dora"])
    for path in sorted(parts):
        if path not in modules or linear_shape(modules[path]) is None:
            raise AdapterError(f"{path}: {_why_no_linear(path, base)}")
    _check_targets(source, base.skeleton, set(parts))
    _check_layout(config["fan_in_fan_out"], {path: modules[path] for path in sorted(parts)})
    updates = {}
    for path, tensors in sorted(parts.items()):
        shape: Any = linear_shape(modules[path])
        r, scaling = _rank_and_scaling(config, path)
        expected = {"lora_A": (r, shape[1]), "lora_B": (shape[0], r), "magnitude": (shape[0],)}
        for leaf, tensor in tensors.items():
            if tuple(tensor.shape) != expected[leaf]:
                raise AdapterError(
                    f"{path}.{leaf} has shape {tuple(tensor.shape)}, rank {r} on the base {base.name!r} needs "
                    f"{expected[leaf]}"
                )
        updates[path] = Update(tensors["lora_A"], tensors["lora_B"], scaling, tensors.get("magnitude"))
    return PeftAdapter(config, updates, base)


def read_settings(source: AdapterFolder) -> dict[str, Any]:
    """Read adapter_config.json; see `PeftAdapter.config`. Torch is not needed.

    Raises:
        AdapterError: a setting is missing, out of range, or changes the result in a way that cannot be honoured.
    """
    settings = Settings(source.config)
    for name, what in REFUSED.items():
        settings.asked.add(name)
        if _is_set(source.config.get(name)):
            raise settings.error(name, f"{what} cannot be honoured")
    if settings.get("task_type", str, "CAUSAL_LM") != "CAUSAL_LM":
        raise settings.error("task_type", "only CAUSAL_LM can be imported")
    if settings.get("bias", str, "none") != "none":
        raise settings.error("bias", "trained biases of the base cannot be honoured")
    start = settings.get("init_lora_weights", (bool, str), True)
    if isinstance(start, str) and start not in INITIALISED:
        raise settings.error(
            "init_lora_weights",
            "training has changed the base (PiSSA and its like): save it with "
            "path_initial_model_for_weight_conversion, which makes it a plain LoRA",
        )
    config = {
        "r": settings.require("r", int),
        "lora_alpha": settings.require("lora_alpha", NUMBER),
        "lora_dropout": settings.get("lora_dropout", NUMBER, 0.0),
        "use_rslora": settings.get("use_rslora", bool, False),
        "use_dora": settings.get("use_dora", bool, False),
        "fan_in_fan_out": settings.get("fan_in_fan_out", bool, False),
        "rank_pattern": settings.get("rank_pattern", dict, {}),
        "alpha_pattern": settings.get("alpha_pattern", dict, {}),
    }
    if config["r"] < 1 or not 0 < config["lora_alpha"] < 1e9:
        raise settings.error("r" if config["r"] < 1 else "lora_alpha", "must be above 0")
    if not 0 <= config["lora_dropout"] < 1:
        raise settings.error("lora_dropout", "must be a probability in [0, 1)")
    for name, kinds in (("rank_pattern", int), ("alpha_pattern", NUMBER)):
        for key, value in config[name].items():
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e9 or not _is_pattern(key):
                raise settings.error(name, f"{key!r} must be a path or a regular expression with a number above 0")
    settings.require("target_modules", (str, list))
    known = settings.asked | PASSED_OVER
    for name, value in source.config.items():
        if name not in known and _is_set(value):
            raise settings.error(name, "this setting is not known here, so it cannot be honoured")
    return config


def _is_set(value: Any) -> bool:
    """Whether a setting asks for something. A number does, 0 included: its default is not known."""
    return value is not None and value is not False and value not in ([], {})


def _is_pattern(key: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return len(key) <= 300


def split_tensors(tensors: dict[str, Value], use_dora: bool) -> dict[str, dict[str, Value]]:
    """Group the tensors of a file, or what stands for them, by the linear that they belong to.

    Returns:
        ``{path of the linear: {"lora_A", "lora_B" and for DoRA "magnitude": tensor}}``, each of them complete.

    Raises:
        AdapterError: a name is not that of a LoRA or DoRA tensor, or an update is incomplete.
    """
    parts: dict[str, dict[str, Value]] = {}
    for name, tensor in tensors.items():
        for part, wrapper in WRAPPERS.items():
            if part in name:
                raise AdapterError(
                    f"{name}: {part!r} in a tensor's name comes from saving the model inside of {wrapper}'s wrapper: "
                    "save the model that the wrapper holds"
                )
        if ".lora_embedding_" in name:
            raise AdapterError(f"{name}: an update of token embeddings cannot be honoured, only those of linears")
        try:
            path, leaf = split_peft(name)
        except ValueError as error:
            raise AdapterError(str(error)) from error
        if leaf in parts.setdefault(path, {}):
            raise AdapterError(f"{name}: this tensor is in the file twice, under two spellings of its name")
        parts[path][leaf] = tensor
    needed = {"lora_A", "lora_B"} | ({"magnitude"} if use_dora else set())
    for path, found in parts.items():
        if found.keys() != needed:
            what = "is missing" if needed - found.keys() else f"does not belong to use_dora={use_dora}"
            raise AdapterError(f"{path}: {sorted(needed ^ found.keys())[0]} {what}")
    return parts


def _rank_and_scaling(config: dict[str, Any], path: str) -> tuple[int, float]:
    """Rank and scaling of a linear, with PEFT's own reading of the patterns."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config["rank_pattern"], config["alpha_pattern"]
    r = ranks.get(get_pattern_key(ranks, path), config["r"])
    alpha = alphas.get(get_pattern_key(alphas, path), config["lora_alpha"])
    return r, alpha / (math.sqrt(r) if config["use_rslora"] else r)


def _check_layout(fan_in_fan_out: bool, adapted: dict[str, Any]) -> None:
    """Raise an AdapterError where `fan_in_fan_out` is true of none of the linears. One setting may cover both kinds."""
    kinds = {path: type(module).__name__ for path, module in adapted.items()}
    if not any((kind == "Conv1D") == fan_in_fan_out for kind in kinds.values()):
        path, kind = next(iter(kinds.items()))
        raise AdapterError(
            f"{PEFT_CONFIG}: fan_in_fan_out={fan_in_fan_out}: the base's {path} is a {kind}; it is True for Conv1D "
            "and False for Linear"
        )


def _drop_base_copies(tensors: dict[str, torch.Tensor], base: BaseSource) -> None:
    """Drop the base's embeddings, which PEFT saves beside an update of them, after comparing them with the base's own.

    Raises:
        AdapterError: they differ, so the adapter belongs to other embeddings than the base has.
    """
    model = base.skeleton
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    for path in [path for path, module in model.named_modules() if any(module is one for one in embeddings)]:
        for name in (f"{PEFT_PREFIX}{path}.weight", f"{PEFT_PREFIX}{path}.base_layer.weight"):
            if name in tensors and not _same_values(tensors.pop(name), base.weight(path)):
                raise AdapterError(
                    f"{name}: differs from {path} of the base {base.name!r}: resized or trained embeddings cannot be "
                    "honoured"
                )


def _same_values(copy: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether two tensors are the same but for the dtype they are held in."""
    import torch

    if copy.shape != own.shape:
        return False
    own = own.detach().cpu()
    return torch.equal(copy, own.to(copy.dtype)) or torch.equal(copy.to(own.dtype), own)


def _why_no_linear(path: str, base: BaseSource) -> str:
    """Say what keeps a tensor's path from being one of the base's linears."""
    kind = f"the base {base.name!r} ({base.config.model_type})"
    found = re.fullmatch(r"(?:(.+?)\.)?(\d+)\.(.+)", path)
    layers_path = base.layers_path
    if found and (found[1] or "") != layers_path and f"{layers_path}.{found[2]}.{found[3]}" in _linears(base.skeleton):
        return (
            f"the adapter's tensors are under {found[1] or 'no prefix'!r}, and {kind} has its layers under "
            f"{layers_path!r}: it was trained on another class of this model; pass base= (--base) of that class"
        )
    return f"{kind} has no such linear"


def _linears(model: Any) -> set[str]:
    from minilora_hub.remote_code.linear_layers import linear_shape

    return {path for path, module in model.named_modules() if linear_shape(module)}


def _check_targets(source: AdapterFolder, model: Any, adapted: set[str]) -> None:
    """Raise an AdapterError unless the linears that the settings name are those that have tensors."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    targets = source.config["target_modules"]
    names = ("exclude_modules", "layers_to_transform", "layers_pattern")
    chosen: dict[str, Any] = {name: source.config.get(name) for name in names}
    linears = _linears(model)
    named = targets
    if isinstance(targets, str) and targets.lower() == "all-linear":  # as in PEFT: every one but the head
        head = model.get_output_embeddings()
        named = [path for path in linears if model.get_submodule(path) is not head]
    try:
        config = LoraConfig(target_modules=named, **chosen)
        wanted = {path for path in linears if check_target_module_exists(config, path)}
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise AdapterError(f"{PEFT_CONFIG}: target_modules={targets!r}: {error}") from error
    for path in sorted(wanted - adapted):
        raise AdapterError(f"{path}: target_modules names it, but there are no tensors for it")
    for path in sorted(adapted - wanted):
        raise AdapterError(f"{path}: there are tensors for it, but target_modules={targets!r} does not name it")
