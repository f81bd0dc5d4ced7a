"""Settings of a training run (`Recipe`), and the defaults of each method.

A setting is a field of `Recipe` or, under `adapter`, of the method's own configuration class, which validates it:
MixLoraConfig, DoraConfig, PEFT's LoraConfig and so on.

The defaults are starting points, not results of a search: learning rates from the papers or libraries for adapters of
this size, and a short warm-up followed by cosine decay. `minilora sweep` finds better values for your data.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict

from minilora_hub.errors import TrainingError

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def plain_value(value: Any) -> Any:
    """Convert a number that YAML 1.1 parses as text (``1e-4`` has no dot) to a number, and a tuple to a list."""
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return plain_value(value)


def _texts(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, (str, os.PathLike)) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError("must be a list of strings")
    if "" in items:
        raise ValueError("contains an empty string: leave it out")
    return tuple(str(item) for item in items)


def _share(of: str) -> AfterValidator:
    def check(value: float) -> float:
        if not 0 <= value < 1:
            raise ValueError(f"must be a share of the {of}, at least 0 and below 1")
        return value

    return AfterValidator(check)


Whole = Annotated[int, BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Flag = Annotated[bool, Strict()]
Text = Annotated[
    str,
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
    Field(min_length=1),
]
Texts = Annotated[tuple[str, ...], BeforeValidator(_texts)]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run, common to all methods.

    Attributes:
        adapter: fields of the method's own configuration.
        budget: the most parameters of an adapter whose ranks EVA distributes over the linears (``r="auto"``).
        learning_rate: the peak learning rate.
        schedule: transformers' name of the schedule after the warm-up: ``"cosine"``, ``"linear"``, ``"constant"``, ….
        warmup: share of the steps over which the learning rate rises from 0.
        epochs: passes over the data, if `max_steps` is not given.
        max_steps: optimizer steps.
        batch_size: rows per optimizer step, over all processes: the same on one process as on eight.
        micro_batch_size: rows per forward pass and process; gradients are accumulated over a step's micro-batches.
            Default: all rows of a step.
        batching: ``"shuffled"``; ``"length-grouped"`` puts rows of similar length together, which pads less;
            ``"packed"`` concatenates rows into sequences of `max_length` tokens; each row attends only to itself.
        optimizer: transformers' name, e.g. ``"adamw_torch"``, ``"paged_adamw_8bit"``.
        loraplus_ratio: LoRA+ (arXiv 2402.12354): the learning rate of B divided by that of A.
        router_lr_ratio: the learning rate of a mixture's routers divided by that of its experts.
        weight_decay: decoupled, on matrices.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        max_length: maximum tokens in a row; default: the base's context.
        truncate: cut longer rows at their end; otherwise a longer row is an error.
        loss_on: ``"completions"``: completions and the assistant's turns; ``"all"``: every token.
        chat: write prompts as chat turns where the tokenizer has a chat template.
        validation: share of the rows to hold out for validation, or 0.
        early_stopping: stop after this many evaluations without a better validation loss.
        save_every: steps between checkpoints and evaluations; default: a tenth of the run.
        keep_checkpoints: number of latest checkpoints to keep, in addition to the best.
        dtype: of the base: ``"auto"`` is bfloat16 on a GPU that supports it, else float32. Adapters are trained in
            float32; on a bfloat16 base they are cast to bfloat16 for each product.
        save_dtype: of the saved adapter: ``"bfloat16"`` halves the file, DoRA's magnitudes stay float32. Only for
            minilora_hub's own methods.
        quantize: ``"nf4"`` or ``"int8"``: a quantised base (QLoRA, arXiv 2305.14314).
        init: ``"loftq"`` or ``"calibrated"``: start from the rounding of a quantized base; see `compensation`.
        double_quant: with ``"nf4"``, also quantise the quantisation constants.
        attention: transformers' name of the base's attention, e.g. ``"eager"``, quicker for short rows on a CPU;
            default: what transformers chooses.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        shard: split base and adapter over the processes with FSDP2, instead of a whole base in each; for minilora_hub's
            own methods.
        seed: of the adapter's initial weights, the order of the rows, dropout and the held-out rows.
        report_to: trackers to log to: ``"trackio"``, ``"tensorboard"``, ``"wandb"``.
    """

    adapter: Mapping[str, Any] = field(default_factory=dict)
    budget: Count | None = None
    learning_rate: Annotated[Real, Field(gt=0)] = 2e-4
    schedule: Text = "cosine"
    warmup: Annotated[Real, _share("steps")] = 0.05
    epochs: Annotated[Real, Field(gt=0)] = 3.0
    max_steps: Count | None = None
    batch_size: Count = 8
    micro_batch_size: Count | None = None
    batching: Literal["shuffled", "length-grouped", "packed"] = "shuffled"
    optimizer: Text = "adamw_torch"
    loraplus_ratio: Annotated[Real, Field(ge=1)] | None = None
    router_lr_ratio: Annotated[Real, Field(gt=0)] | None = None
    weight_decay: Annotated[Real, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[Real, Field(ge=0)] = 1.0
    max_length: Count | None = None
    truncate: Flag = False
    loss_on: Literal["completions", "all"] = "completions"
    chat: Flag = True
    validation: Annotated[Real, _share("rows")] = 0.0
    early_stopping: Count | None = None
    save_every: Count | None = None
    keep_checkpoints: Count = 2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["nf4", "int8"] | None = None
    init: Literal["zero", "loftq", "calibrated"] = "zero"
    double_quant: Flag = True
    attention: Text | None = None
    gradient_checkpointing: Flag = False
    shard: Flag = False
    seed: Annotated[Whole, Field(ge=0, lt=2**32)] = 0
    report_to: Texts = ()


_LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
_MIXLORA = {"r": 16, "lora_alpha": 32, "num_experts": 8, "router_aux_loss_coef": 0.001}
_PEFT_LORA = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": "all-linear"}

RECIPES: dict[str, dict[str, Any]] = {
    # LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353) on every linear of the decoder layers
    "lora": {"adapter": _LORA},
    "dora": {"adapter": _LORA},
    # LoRA experts in the feed-forward blocks, LoRA on attention (arXiv 2404.15159); the routing strategy determines how
    # many experts serve a token, two by default. MixDoRA: experts and attention adapters are DoRA.
    "mixlora": {"adapter": _MIXLORA},
    "mixdora": {"adapter": _MIXLORA | {"use_dora": True}},
    # LoRA scaled by alpha / sqrt(r), so that larger ranks do not train more slowly (arXiv 2312.03732)
    "rslora": {"learning_rate": 1e-4, "adapter": _PEFT_LORA | {"use_rslora": True}},
    # initialised with the base's principal components (arXiv 2404.02948); saved as a LoRA of twice the rank
    "pissa": {"learning_rate": 1e-4, "adapter": _PEFT_LORA | {"init_lora_weights": "pissa"}},
    # initialised to compensate the rounding of an NF4 base (arXiv 2310.08659)
    "loftq": {"quantize": "nf4", "double_quant": False, "adapter": _PEFT_LORA},
    # starts at rank `init_r` and prunes unimportant ranks, to `target_r` on average (arXiv 2303.10512); by default no
    # rank is pruned in the first tenth of the run and in its last third (`tinit`, `tfinal`)
    "adalora": {
        "learning_rate": 1e-3,
        "adapter": {
            "peft_type": "ADALORA",
            "init_r": 12,
            "target_r": 8,
            "lora_alpha": 32,
            "target_modules": "all-linear",
        },
    },
    # trains a few coefficients of the update's spectrum (arXiv 2405.03003)
    "fourierft": {
        "learning_rate": 1e-3,
        "adapter": {"peft_type": "FOURIERFT", "n_frequency": 1000, "scaling": 150.0, "target_modules": "all-linear"},
    },
    # frozen random matrices shared by all layers; two vectors per layer are trained (arXiv 2310.11454)
    "vera": {"learning_rate": 4e-3, "adapter": {"peft_type": "VERA", "r": 256, "target_modules": "all-linear"}},
    # any causal-LM method of PEFT: `peft_type` names it, the other fields are its configuration's
    "peft": {"adapter": {}},
}
"""The defaults of each method that differ from `Recipe`."""
OURS = ("lora", "dora", "mixlora", "mixdora")
"""Methods trained with minilora_hub's own modules; the others use PEFT's."""


def adapter_field_names(method: str, chosen: Mapping[str, Any]) -> set[str]:
    """Return the names of the fields of a method's configuration that a user may set.

    Args:
        method: a name in `RECIPES`.
        chosen: the fields that are set; ``"peft_type"`` names a method of PEFT.
    """
    if method not in OURS:
        given = {"task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "total_step"}
        return {field.name for field in dataclasses.fields(peft_config_class(chosen))} - given
    from minilora_hub.remote_code.configuration_minilora import AdapterConfig, DoraConfig, MixLoraConfig

    config: Any = {"dora": DoraConfig, "lora": AdapterConfig}.get(method, MixLoraConfig)
    given = {"base_model_name_or_path", "base_model_revision", "base_fingerprint", "base_quantization"}
    given |= {"text_config", "format_version"}
    return set(config._own_fields()) - given - ({"use_dora"} if method in ("lora", "dora") else set())


def peft_config_class(chosen: Mapping[str, Any]) -> Any:
    """Return PEFT's configuration class of the method that ``chosen["peft_type"]`` names.

    Raises:
        TrainingError: PEFT has no such method.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from minilora_hub.integrations.peft import method as peft_method

    peft_method.register()  # adds MIXLORA to PEFT's methods
    known = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    name = str(chosen.get("peft_type", "")).upper()
    if name not in known:
        raise TrainingError(f"peft_type={chosen.get('peft_type')!r}: must be one of {', '.join(sorted(known))}")
    return PEFT_TYPE_TO_CONFIG_MAPPING[known[name]]
