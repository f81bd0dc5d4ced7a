"""Read the settings in adapter_config.json strictly: unsupported ones are errors. Torch is not needed."""

from __future__ import annotations

import re
from typing import Any

from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.names import LEGACY_STRATEGIES, PEFT_CONFIG, STRATEGIES
from minilora_hub.errors import AdapterError

NUMBER = (int, float)
NO_DROPOUT = 1e-12
"""Written instead of a dropout of 0, which the reference rejects."""
REFUSED = {
    "alora_invocation_tokens": "an adapter that is active in a part of the text",
    "arrow_config": "routing between adapters",
    "ensure_weight_tying": "tied adapters",
    "kasa_config": "KaSA",
    "layer_replication": "layers that the base does not have",
    "lora_bias": "biases on lora_B",
    "megatron_config": "Megatron's parallel linears",
    "modules_to_save": "whole modules trained beside the adapter",
    "monteclora_config": "MonteCLoRA",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QA-LoRA, which pools its input",
    "velora_config": "VeLoRA",
}
"""Settings that change the result and are not supported: setting -> description."""
PASSED_OVER = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type", "unsloth_fixed",
}  # fmt: skip
"""Settings that only affect training, and those whose effect is visible in the tensor names."""
INITIALISED = ("gaussian", "orthogonal", "eva")
"""Initialisations that do not change the base, unlike PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ."""


class Settings:
    """The fields of a configuration file.

    Args:
        content: the fields.
        file: the name used in errors.

    Attributes:
        asked: names of the fields that were read.
    """

    def __init__(self, content: dict[str, Any], file: str = PEFT_CONFIG) -> None:
        self.content, self.file, self.asked = content, file, set[str]()

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field, or `default` if it is missing or null.

        Raises:
            AdapterError: it has another type.
        """
        self.asked.add(name)
        value = self.content.get(name)
        if value is None:
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise self.error(name, f"must be of type {' or '.join(kind.__name__ for kind in allowed)}")
        return value

    def require(self, name: str, kinds: type | tuple[type, ...]) -> Any:
        """Return a required field.

        Raises:
            AdapterError: it is missing or has another type.
        """
        value = self.get(name, kinds)
        if value is None:
            raise AdapterError(f"{self.file}: {name} is missing")
        return value

    def error(self, name: str, need: str) -> AdapterError:
        """Build the error about a field: file, name, value received, what is required."""
        shown = repr(self.content.get(name))
        return AdapterError(f"{self.file}: {name}={shown[:120]}: {need}")


# ---- PEFT's LoRA and DoRA ----


def read_lora_settings(source: AdapterFolder) -> dict[str, Any]:
    """Read adapter_config.json of a LoRA or DoRA; see `PeftAdapter.config`. Torch is not needed.

    Raises:
        AdapterError: a setting is missing, out of range, or changes the result in a way that is not supported.
    """
    settings = Settings(source.config)
    for name, what in REFUSED.items():
        settings.asked.add(name)
        if _is_set(source.config.get(name)):
            raise settings.error(name, f"not supported: {what}")
    if settings.get("task_type", str, "CAUSAL_LM") != "CAUSAL_LM":
        raise settings.error("task_type", "only CAUSAL_LM can be imported")
    if settings.get("bias", str, "none") != "none":
        raise settings.error("bias", "trained biases of the base are not supported")
    start = settings.get("init_lora_weights", (bool, str), True)
    if isinstance(start, str) and start not in INITIALISED:
        raise settings.error(
            "init_lora_weights",
            "training has changed the base (PiSSA and similar methods): save it with "
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
    parameters = settings.get("target_parameters", list, [])
    if not all(isinstance(name, str) and name for name in parameters):
        raise settings.error("target_parameters", "must be a list of names of parameters")
    if parameters:
        if config["use_dora"]:
            raise settings.error("target_parameters", "PEFT has no DoRA on parameters, so this cannot be its adapter")
        config["target_parameters"] = sorted(set(parameters))
        settings.get("target_modules", (str, list))
    else:
        settings.require("target_modules", (str, list))
    known = settings.asked | PASSED_OVER
    for name, value in source.config.items():
        if name not in known and _is_set(value):
            raise settings.error(name, "unknown setting, which is not supported")
    return config


def _is_set(value: Any) -> bool:
    """Whether a setting has an effect. Any number counts, including 0, because its default is not known."""
    return value is not None and value is not False and value not in ([], {})


def _is_pattern(key: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({key})$")
    except re.error:
        return False
    return len(key) <= 300


# ---- the reference's MixLoRA ----


def read_reference_fields(source: AdapterFolder) -> dict[str, Any]:
    """Read the reference's adapter_config.json as fields of a MixLoraConfig, except the targets, which need the base.

    Raises:
        AdapterError: a field is missing, has the wrong type, or is not supported.
    """
    settings = Settings(source.config)
    if settings.get("task_type", str, "CAUSAL_LM") != "CAUSAL_LM":
        raise settings.error("task_type", "only CAUSAL_LM can be imported")
    if settings.get("bias", str, "none") != "none":
        raise settings.error("bias", "adapters with biases are not supported")
    return _common_fields(settings) | _expert_fields(settings) | _routing_fields(settings)


def _common_fields(settings: Settings) -> dict[str, Any]:
    dropout = settings.get("lora_dropout", NUMBER, 0.0)
    return {
        "r": settings.require("r", int),
        "lora_alpha": settings.require("lora_alpha", NUMBER),
        "lora_dropout": 0.0 if dropout == NO_DROPOUT else dropout,
        "use_dora": settings.get("use_dora", bool, False),
        "use_rslora": settings.get("use_rslora", bool, False),
        "num_experts": settings.require("num_experts", int),
    }


def _expert_fields(settings: Settings) -> dict[str, Any]:
    """`expert_lora` overrides the common settings for the experts."""
    if settings.get("expert_lora", dict) is None:
        return {}
    own = settings.content["expert_lora"]
    experts = Settings(settings.content | own, f"{PEFT_CONFIG}: expert_lora")
    for name in ("use_dora", "use_rslora"):
        if experts.get(name, bool, False) != settings.get(name, bool, False):
            raise experts.error(name, "experts that differ from attention in this setting are not supported")
    dropout = experts.get("lora_dropout", NUMBER, 0.0)
    if dropout != settings.get("lora_dropout", NUMBER, 0.0):
        raise experts.error("lora_dropout", "a separate dropout of the experts is not supported")
    return {"expert_r": experts.require("r", int), "expert_alpha": experts.require("lora_alpha", NUMBER)}


def _routing_fields(settings: Settings) -> dict[str, Any]:
    """The strategy and its settings; defaults are the reference's."""
    known = STRATEGIES | LEGACY_STRATEGIES
    strategy = known.get(settings.require("routing_strategy", str))
    if strategy is None:
        raise settings.error("routing_strategy", f"must be one of {sorted(known)}")
    fields: dict[str, Any] = {
        "routing_strategy": strategy,
        "router_aux_loss_coef": settings.get("router_aux_loss_coef", NUMBER, 0.001),
        "router_init_range": settings.get("router_init_range", NUMBER, 1.0 if strategy == "switch" else 0.02),
        "router_jitter_noise": settings.get("jitter_noise", NUMBER, 0.01 if strategy == "switch" else 0.0),
    }
    if not settings.get("router_loss", bool, True):
        fields["router_aux_loss_coef"] = 0.0
    if strategy == "top_k":
        fields["num_experts_per_tok"] = settings.get("top_k", int, 2)
    elif strategy == "top_p":
        fields["router_top_p"] = settings.get("top_p", NUMBER, 0.8)
        fields["router_temperature"] = settings.get("temperature", NUMBER, 0.0)
    else:
        fields["expert_capacity"] = settings.get("expert_capacity", int, 32)
        fields["router_z_loss_coef"] = settings.get("router_z_loss_coef", NUMBER, 0.001)
        fields["expert_dropout"] = settings.get("ffn_dropout", NUMBER, 0.0)
        fields["router_sparse_step"] = settings.get("sparse_step", int, 1)
    return fields


def check_settings(source: AdapterFolder) -> None:
    """Check the settings of an adapter that is not in our format; the base is not needed.

    Raises:
        AdapterError: a setting is missing, out of range or not supported.
    """
    if source.dialect == "peft":
        read_lora_settings(source)
    elif source.dialect == "reference":
        read_reference_fields(source)
