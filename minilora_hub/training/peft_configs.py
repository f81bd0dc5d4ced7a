"""PEFT's configuration classes by the name of their method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from minilora_hub.errors import TrainingError


def config_class_of(chosen: Mapping[str, Any]) -> Any:
    """The configuration class of the method that ``chosen["peft_type"]`` names.

    Raises:
        TrainingError: PEFT has no such method.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from minilora_hub.integrations.peft import method as peft_method

    peft_method.register()  # PEFT knows MIXLORA then, too
    known = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    name = str(chosen.get("peft_type", "")).upper()
    if name not in known:
        raise TrainingError(f"peft_type={chosen.get('peft_type')!r}: must be one of {', '.join(sorted(known))}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[known[name]]


def config_fields(chosen: Mapping[str, Any]) -> set[str]:
    """Names of the fields of the PEFT configuration that `chosen` asks for with its ``peft_type``."""
    ours = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "total_step"}
    return {field.name for field in dataclasses.fields(config_class_of(chosen))} - ours
