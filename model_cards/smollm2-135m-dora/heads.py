"""Bases with other heads than a language model's: their classes, their labels, and the modules saved whole with them.

An adapter's class is named for the Auto class of its base: ``AutoModelForSequenceClassification`` loads the base of a
``DoraForSequenceClassification``. A head that the base's checkpoint lacks is random: it is trained with the adapter and
saved with it, as are all modules that `modules_to_save` names.
"""

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from .layer_stacks import outermost_lists

HEADS = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForCTC": "MODEL_FOR_CTC_MAPPING",
    "AutoModelForAudioClassification": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "AutoModelForZeroShotImageClassification": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING",
}
"""The Auto classes whose bases take an adapter, and where transformers lists the classes of each."""
CAUSAL = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
"""Those whose labels are shifted."""
GENERATING = (*CAUSAL, "AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
CLASSIFYING = (
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForCTC", "AutoModelForAudioClassification", "AutoModelForImageClassification",
)  # fmt: skip
"""Those whose head may be fresh. A language model's is never: it would be random."""
FRESH = ("AutoModel", *CLASSIFYING)
"""Those whose checkpoint may lack a module: a head, or the pooler of an encoder."""
DESCRIBED_LABELS = ("id2label", "label2id", "problem_type", "pad_token_id")
"""Fields of a base's configuration that belong to the adapter's task."""


def class_name(prefix: str, auto_name: str) -> str:
    """Return the name of our class: ``DoraForCTC`` for AutoModelForCTC, ``DoraModel`` for AutoModel."""
    return prefix + (auto_name.removeprefix("AutoModel") or "Model")


def label_names(auto_name: str) -> tuple[str, ...]:
    """Return the arguments of a base's forward that hold labels."""
    if auto_name == "AutoModelForQuestionAnswering":
        return ("start_positions", "end_positions")
    return () if auto_name in ("AutoModel", "AutoModelForZeroShotImageClassification") else ("labels",)


def auto_names(base: Any, auto_name: str, saved: Collection[str]) -> list[str]:
    """Return the Auto classes with which an adapter on this base loads.

    `auto_name` is that of the adapter's own class. Only the base's own class has the modules in `saved`.
    """
    leading = [name for name in HEADS if isinstance(base, _classes(name, type(base.config)))]
    text = {"AutoModel", "AutoModelForCausalLM"}
    if not leading:  # a base with code of its own
        return [auto_name] if saved or auto_name not in text else sorted(text)
    if saved:
        return [name for name in leading if name != "AutoModel"] or leading
    if text & set(leading):
        return [name for name in HEADS if name in {*leading, *text} and _classes(name, type(base.config))]
    # The body alone does not need the head.
    return ["AutoModel"] * bool(_classes("AutoModel", type(base.config))) + leading


def auto_map(prefix: str, names: Iterable[str] = ("AutoModel", "AutoModelForCausalLM")) -> dict[str, str]:
    """Return the classes that transformers' Auto classes load from a repo with this code."""
    models = {name: f"modeling_minilora.{class_name(prefix, name)}" for name in names}
    return {"AutoConfig": f"configuration_minilora.{prefix}Config", **models}


def _classes(auto_name: str, config_class: type) -> tuple[type, ...]:
    """Return the classes that an Auto class loads for bases of this configuration."""
    found = getattr(modeling_auto, HEADS[auto_name]).get(config_class, ())
    return found if isinstance(found, tuple) else (found,)


def list_for_trainers(model_class: Any) -> None:
    """Add a class to transformers' tables of names, by which trainers and pipelines know what a model is for.

    Registering with the Auto classes adds nothing there; for one, Trainer shifts labels under label smoothing by it.
    """
    names = getattr(modeling_auto, f"{HEADS[model_class.auto_class.__name__]}_NAMES")
    names.setdefault(model_class.config_class.model_type, model_class.__name__)


# ---- modules that are saved whole ----


def saved_parameters(base: nn.Module, modules: Collection[str] | None, adapted: Iterable[str] = ()) -> dict[str, Any]:
    """Return {path in the base: parameter} of the modules that are trained and saved whole.

    Args:
        base: the base.
        modules: their paths, or ends of paths.
        adapted: paths of the modules that are adapted, which none of them may hold.
    """
    found: dict[str, Any] = {}
    adapted = list(adapted)
    for name in modules or ():
        paths = [path for path, _ in base.named_modules() if path == name or path.endswith(f".{name}")]
        held = {f"{path}.{key}": p for path in paths for key, p in base.get_submodule(path).named_parameters()}
        if not held:
            kind = type(base).__name__
            raise ValueError(f"modules_to_save=[{name!r}]: the base {kind} has no such module with parameters")
        for site in adapted:
            if any(f"{site}.".startswith(f"{path}.") or path.startswith(f"{site}.") for path in paths):
                raise ValueError(f"modules_to_save=[{name!r}]: {site} is adapted, so it cannot be saved whole")
        found |= held
    return found


def fresh_modules(base: Any, missing: Iterable[str], auto_name: str) -> tuple[list[str], list[str]]:
    """Split parameters that a checkpoint lacks: those of a classifier's head or a pooler, as modules, and others."""
    body = {base.base_model_prefix}
    if base.base_model is base:  # Whisper's classifier has its encoder without a name for the body
        body = {path.partition(".")[0] for path in outermost_lists(base)}
    modules: dict[str, None] = {}
    others = []
    for name in missing:
        parts = name.split(".")
        if "pooler" in parts[:-1]:
            modules[".".join(parts[: parts.index("pooler") + 1])] = None
        elif auto_name in CLASSIFYING and parts[0] not in body and len(parts) > 1:
            modules[parts[0]] = None
        else:
            others.append(name)
    return list(modules), others
