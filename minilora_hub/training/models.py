"""Build the model to train: the base, quantised or not, with an adapter of the method in it, fresh or a parent's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.tasks import CAUSAL_LM
from minilora_hub.bases import loading
from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import BaseModelError, TrainingError
from minilora_hub.training.recipes import OURS
from minilora_hub.training.settings import TrainingSettings

if TYPE_CHECKING:
    from minilora_hub.training.parent_adapter import FoundAdapter


@dataclass(frozen=True)
class Trainee:
    """A model ready to be trained.

    Attributes:
        model: the base with the adapter in it; only the adapter requires gradients.
        base_parameters: number of parameters of the base.
        fingerprint: hash of the base's weights.
        parent: the adapter it continues from.
        kept: frozen adapters under the new one; see `kept_adapters`.
    """

    model: Any
    base_parameters: int
    fingerprint: str
    parent: FoundAdapter | None = None
    kept: Any = None


def load_tokenizer(resolved: ResolvedBase) -> Any:
    """Load the base's tokenizer, and add the padding token that training needs and some bases lack.

    Raises:
        BaseModelError: it cannot be loaded, or has no eos token.
    """
    return with_needed_tokens(loading.load_tokenizer(resolved), resolved)


def with_needed_tokens(processor: Any, resolved: ResolvedBase) -> Any:
    """Return a tokenizer, or a processor with one, with a padding token.

    Raises:
        BaseModelError: it has no eos token.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if tokenizer.eos_token is None:
        known = end_token_ids(processor, base_generation_config(resolved))
        example = tokenizer.convert_ids_to_tokens(known[0]) if known else "</s>"
        raise BaseModelError(
            f"base {resolved.name!r}: its tokenizer has no eos token, so answers would not end: set one in its "
            f'tokenizer_config.json, e.g. "eos_token": "{example}"'
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def base_context(resolved: ResolvedBase) -> int:
    """Return the length of the base's context in tokens."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(resolved.path, trust_remote_code=False).get_text_config(decoder=True)
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return int(length or 2048)


def base_generation_config(resolved: ResolvedBase) -> Any:
    """Return the base's generation settings from its folder, or the defaults from its configuration."""
    from transformers import AutoConfig, GenerationConfig

    if (resolved.path / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(resolved.path)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(resolved.path, trust_remote_code=False))


def check_embedding(model: Any, tokenizer: Any, largest: int, resolved: ResolvedBase) -> None:
    """Check that a base has an embedding for every token of the data, up to the id `largest`.

    Raises:
        BaseModelError: it has fewer; the message names the token.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise BaseModelError(
            f"base {resolved.name!r}: its tokenizer writes {token!r} as id {largest}, "
            f"and the base has embeddings for {rows} ids: use the base's original tokenizer, or resize the "
            "embeddings (resize_token_embeddings), train them and save the base"
        )


def compute_dtype(settings: TrainingSettings) -> Any:
    """Return the dtype of the base's weights and of the computation: see `Recipe.dtype`."""
    import torch

    if settings.recipe.dtype != "auto":
        return getattr(torch, settings.recipe.dtype)
    return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32


def build_trainee(
    settings: TrainingSettings,
    resolved: ResolvedBase,
    auto_class: str = CAUSAL_LM,
    model_arguments: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Trainee, tuple[str, ...]]:
    """Load the base and add a fresh adapter, or the one to continue from.

    Args:
        settings: of the run.
        resolved: the base.
        auto_class: name of the Auto class that loads the base.
        model_arguments: further arguments for its from_pretrained.

    Returns:
        The model, and notes for the user.

    Raises:
        BaseModelError: the base cannot be loaded.
        TrainingError, ValueError: the adapter's configuration or weights do not fit it.
    """
    trainee = _fresh_trainee(settings, resolved, auto_class, model_arguments)
    if not (settings.from_adapter or settings.keep):
        return trainee, ()
    from minilora_hub.bases.skeleton import find_base
    from minilora_hub.training import parent_adapter

    base = find_base(settings.base, settings.base_revision)
    notes: tuple[str, ...] = ()
    if settings.from_adapter:
        found = parent_adapter.find_adapter(settings.from_adapter, settings.from_revision)
        notes = parent_adapter.load_parent(trainee.model, found, base)
        parent_adapter.choose_trainable(trainee.model, settings.learn, base)
        trainee = replace(trainee, parent=found)
    if settings.keep:
        from minilora_hub.training.kept_adapters import KeptAdapters

        adapters = [parent_adapter.find_adapter(name) for name in settings.keep]
        trainee = replace(trainee, kept=KeptAdapters(trainee.model, adapters, base))
    return trainee, notes


def _fresh_trainee(
    settings: TrainingSettings, resolved: ResolvedBase, auto_class: str, model_arguments: Mapping[str, Any]
) -> Trainee:
    arguments = base_arguments(settings) | dict(model_arguments)
    if settings.method in OURS:
        model = _ours(settings, resolved, arguments, auto_class)
        fingerprint = model.config.base_fingerprint
    else:
        from minilora_hub.remote_code.adapter_files import base_fingerprint
        from minilora_hub.training.passthrough import build_peft_model

        model = build_peft_model(settings, resolved, arguments)
        fingerprint = base_fingerprint(str(resolved.path))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    # A 4-bit weight holds two parameters in a byte.
    shapes = (getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape) for parameter in frozen)
    return Trainee(model, sum(shape.numel() for shape in shapes), fingerprint)


def base_arguments(settings: TrainingSettings) -> dict[str, Any]:
    """Return the arguments for the base's from_pretrained: dtype, attention, quantisation, placement."""
    import torch

    dtype = compute_dtype(settings)
    arguments: dict[str, Any] = {"dtype": dtype}
    if settings.recipe.attention:
        arguments["attn_implementation"] = settings.recipe.attention
    quantize = settings.recipe.quantize
    if quantize:
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = (
            BitsAndBytesConfig(load_in_8bit=True)
            if quantize == "int8"
            else BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=settings.recipe.double_quant,
                bnb_4bit_compute_dtype=dtype,
            )
        )
        if torch.cuda.is_available():
            from accelerate import PartialState

            arguments["device_map"] = {"": PartialState().local_process_index}
    return arguments


def _ours(settings: TrainingSettings, resolved: ResolvedBase, arguments: dict[str, Any], auto_class: str) -> Any:
    from minilora_hub import DoraConfig, MixLoraConfig
    from minilora_hub.integrations import trl
    from minilora_hub.remote_code.heads import GENERATING
    from minilora_hub.remote_code.modeling_minilora import adapted_class
    from minilora_hub.training.lora_model import LoraConfig, LoraForCausalLM

    if auto_class in GENERATING:
        trl.register()
    configs = {"lora": LoraConfig, "dora": DoraConfig}
    config = configs.get(settings.method, MixLoraConfig)(**settings.recipe.adapter)
    prefix = "Dora" if settings.method == "dora" else "MixLora"
    model_class: Any = LoraForCausalLM if settings.method == "lora" else adapted_class(prefix, auto_class)
    if resolved.revision:
        arguments = arguments | {"revision": resolved.revision}
    try:
        return model_class.from_base(settings.base, config, seed=settings.recipe.seed, **arguments)
    except OSError as error:
        raise BaseModelError(" ".join(str(error).split())) from error


def trainable_parameters(model: Any) -> dict[str, Any]:
    """Return ``{name: parameter}`` of the trainable parameters.

    Raises:
        TrainingError: there are none.
    """
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not found:
        raise TrainingError("the model has no trainable parameter: check the adapter's targets")
    return found
