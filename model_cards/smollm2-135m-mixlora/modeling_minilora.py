"""The public models: MixLoRA and DoRA adapters in a base with a language-model head, with another one, or with none."""

import inspect
from typing import Any

import transformers
from transformers import AutoModel, AutoModelForCausalLM
from transformers.generation import GenerationMixin

from .adapted_model import AdaptedModel
from .base_delegation import done_by_base
from .configuration_minilora import DoraConfig, MixLoraConfig
from .heads import GENERATING, HEADS, class_name, label_names, list_for_trainers
from .mixlora_model import MixLoraBase, MixLoraCausalLMOutput, MixLoraModelOutput
from .trainer_support import shown_with


class GenerateOnBase:
    """Generation is the base's own, with its cache and settings: the adapter is part of it."""

    base: Any

    generate = done_by_base("generate")
    prepare_inputs_for_generation = done_by_base("prepare_inputs_for_generation")

    @property
    def generation_config(self) -> Any:
        return self.base.generation_config

    @generation_config.setter
    def generation_config(self: Any, value: Any) -> None:
        if "base" in self._modules:  # transformers sets a default one before there is a base
            self.base.generation_config = value


class UsesOtherMethods:
    """Whatever else the base can do (`get_image_features`, …) is done by it."""

    # Or Trainer would refuse an adapter on a quantised base, whose own attribute it would see. transformers' refusal of
    # half() and float() on such a base is lost with it.
    is_quantized = False

    def __getattr__(self: Any, name: str) -> Any:
        try:
            return super().__getattr__(name)  # type: ignore[misc]
        except AttributeError:
            if name.startswith("_") or "base" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self._modules["base"], name)


class DoraForCausalLM(GenerateOnBase, AdaptedModel, GenerationMixin):
    """A causal language model with a DoRA adapter (arXiv 2402.09353) in it."""

    config_class = DoraConfig
    auto_class = AutoModelForCausalLM
    forward = shown_with(inspect.getattr_static(AdaptedModel, "forward"), ("labels",))  # type: ignore[assignment]


class MixLoraModel(UsesOtherMethods, MixLoraBase):
    """A base without its language-model head, with a MixLoRA adapter (arXiv 2404.15159) in it."""

    config_class = MixLoraConfig
    auto_class = AutoModel
    output_class = MixLoraModelOutput


class MixLoraForCausalLM(GenerateOnBase, MixLoraBase, GenerationMixin):
    """A causal language model with a MixLoRA adapter (arXiv 2404.15159) in it."""

    config_class = MixLoraConfig
    auto_class = AutoModelForCausalLM
    output_class = MixLoraCausalLMOutput
    forward = shown_with(inspect.getattr_static(MixLoraBase, "forward"), ("labels",))  # type: ignore[assignment]


# ---- the classes of bases with other heads ----
KINDS: dict[str, tuple[Any, Any]] = {"Dora": (DoraConfig, AdaptedModel), "MixLora": (MixLoraConfig, MixLoraBase)}


def adapted_class(prefix: str, auto_name: str) -> Any:
    """Return the class for bases that an Auto class loads: ``Dora`` and ``AutoModelForCTC`` give ``DoraForCTC``.

    Args:
        prefix: one of `KINDS`.
        auto_name: one of `HEADS`.
    """
    name = class_name(prefix, auto_name)
    if name not in globals():
        config_class, kind = KINDS[prefix]
        generating = auto_name in GENERATING
        bases = (*(GenerateOnBase,) * generating, UsesOtherMethods, kind, *(GenerationMixin,) * generating)
        forward = shown_with(inspect.getattr_static(kind, "forward"), label_names(auto_name))
        about = f"A base that `{auto_name}` loads, with a {prefix} adapter in it."
        made = {"config_class": config_class, "auto_class": getattr(transformers, auto_name), "forward": forward}
        globals()[name] = type(name, bases, {**made, "__module__": __name__, "__doc__": about})
        list_for_trainers(globals()[name])
    return globals()[name]


def __getattr__(name: str) -> Any:
    for prefix in KINDS:
        for auto_name in HEADS:
            if class_name(prefix, auto_name) == name:
                return adapted_class(prefix, auto_name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


DoraModel = adapted_class("Dora", "AutoModel")
for _model_class in (DoraForCausalLM, MixLoraModel, MixLoraForCausalLM):
    list_for_trainers(_model_class)
