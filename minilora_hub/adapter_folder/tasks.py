"""The task of an adapter: the Auto class that loads it, and what the Hub calls it. Torch is not imported."""

from __future__ import annotations

import re
from typing import Any, Literal

CLASS_PREFIXES = {"mixlora": "MixLora", "dora": "Dora"}
PIPELINES = {
    "AutoModel": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
}
"""Auto class -> the `pipeline_tag` of its models."""
Inputs = Literal["text", "image", "sound", "image and text", "sound and text"]
INPUTS: dict[str, Inputs] = {
    "AutoModelForImageTextToText": "image and text",
    "AutoModelForSpeechSeq2Seq": "sound and text",
    "AutoModelForCTC": "sound and text",
    "AutoModelForAudioClassification": "sound",
    "AutoModelForImageClassification": "image",
    "AutoModelForZeroShotImageClassification": "image and text",
}
"""Auto class -> what its models read or write, where that is not text alone."""
CAUSAL_LM = "AutoModelForCausalLM"
_TEXT = ("AutoModel", CAUSAL_LM)


def own_auto_map(model_type: object, names: tuple[str, ...] = _TEXT) -> dict[str, str] | None:
    """Return the `auto_map` of an adapter in our format that these Auto classes load; None for any other model type."""
    prefix = CLASS_PREFIXES.get(model_type) if isinstance(model_type, str) else None
    if prefix is None:
        return None
    models = {name: f"modeling_minilora.{prefix}{name.removeprefix('AutoModel') or 'Model'}" for name in names}
    return {"AutoConfig": f"configuration_minilora.{prefix}Config", **models}


def is_own_auto_map(value: object, model_type: object) -> bool:
    """Whether an `auto_map` names nothing but our classes, each under the Auto class that it is for."""
    if not isinstance(value, dict):
        return False
    names = tuple(name for name in value if name in PIPELINES)
    return bool(names) and value == own_auto_map(model_type, names)


def auto_class_of(config: dict[str, Any]) -> str:
    """Return the name of the Auto class that loads an adapter in our format, from its config.json.

    It is that of a causal language model where the configuration says nothing.
    """
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    found = re.fullmatch(r"(?:MixLora|Dora)(Model|For\w+)", named)
    name = f"AutoModel{found[1].removeprefix('Model')}" if found else CAUSAL_LM
    return name if name in PIPELINES else CAUSAL_LM


def inputs_of(config: dict[str, Any]) -> Inputs:
    """Return what an adapter in our format reads or writes, from its config.json."""
    name = auto_class_of(config)
    base = config.get("text_config")
    if name in INPUTS or name != "AutoModel" or not isinstance(base, dict):
        return INPUTS.get(name, "text")
    if "vision_config" in base:
        return "image and text"
    return "image" if "image_size" in base else "sound" if base.keys() & {"num_mel_bins", "conv_dim"} else "text"


def pipeline_tag(config: dict[str, Any]) -> str:
    """Return the `pipeline_tag` of an adapter in our format, from its config.json."""
    tag = PIPELINES[auto_class_of(config)]
    return f"image-{tag}" if tag == "feature-extraction" and inputs_of(config) == "image" else tag
