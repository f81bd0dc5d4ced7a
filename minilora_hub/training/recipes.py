"""How each method is trained by default: a frozen dataclass per method.

A field is a setting of the training itself (`Recipe`) or, under `adapter`, of the method's own configuration class,
which checks its values: MixLoraConfig, DoraConfig, PEFT's LoraConfig and so on. Every field can be overridden by name;
`minilora_hub.training.settings` does that and refuses a name that neither has.

The defaults are starting points, not results of a search: learning rates that the papers or the libraries name for
adapters of this size, and a short warm-up into a cosine. `minilora sweep` finds better ones for your data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

Batching = Literal["shuffled", "length-grouped", "packed"]


def _fields(**values: Any) -> Any:
    return field(default_factory=lambda: MappingProxyType(dict(values)))


@dataclass(frozen=True)
class Recipe:
    """Settings of a training run, whatever the method.

    Attributes:
        adapter: fields of the method's own configuration.
        learning_rate: the peak.
        schedule: transformers' name of what follows the warm-up, e.g. ``"cosine"``, ``"linear"``, ``"constant"``.
        warmup: share of the steps over which the learning rate rises from 0.
        epochs: passes over the data, where `max_steps` is not given.
        max_steps: optimizer steps.
        batch_size: rows per optimizer step, over all processes: the same on one process as on eight.
        micro_batch_size: rows per forward pass and process; default: all of a step's. The rest is accumulated.
        batching: ``"shuffled"``; ``"length-grouped"`` puts rows of similar length together, which pads less;
            ``"packed"`` lays rows end to end into rows of `max_length` tokens, each attending to itself only.
        optimizer: transformers' name, e.g. ``"adamw_torch"``, ``"paged_adamw_8bit"``.
        loraplus_ratio: LoRA+ (arXiv 2402.12354): B learns that many times faster than A.
        weight_decay: decoupled, on matrices.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        max_length: tokens in a row at most; default: the base's context.
        truncate: cut longer rows at their end; otherwise a longer row is an error.
        loss_on: ``"completions"``: what the model is to say; ``"all"``: prompts, too.
        chat: write prompts as chat turns where the tokenizer has a chat template.
        validation: share of the rows that is held out, or 0.
        early_stopping: stop after that many evaluations without a better validation loss.
        save_every: steps between checkpoints and evaluations; default: a tenth of the run.
        keep_checkpoints: how many of the last to keep; the best one is kept, too.
        dtype: of the base: ``"auto"`` is bfloat16 on a GPU that has it, else float32. Adapters learn in float32;
            on a bfloat16 base they are rounded to it where they are multiplied.
        save_dtype: of the saved adapter: ``"bfloat16"`` halves the file, DoRA's magnitudes stay float32. For our own
            methods; PEFT's are saved as they were trained.
        quantize: ``"nf4"`` or ``"int8"``: a quantised base (QLoRA, arXiv 2305.14314).
        double_quant: with ``"nf4"``, quantise the constants, too.
        attention: transformers' name of the base's attention, e.g. ``"eager"``, quicker for short rows on a CPU;
            default: what transformers chooses.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        seed: of the adapter's initial weights, the order of the rows, dropout and the held-out rows.
        report_to: where to log: ``"trackio"``, ``"tensorboard"``, ``"wandb"``.
    """

    adapter: Mapping[str, Any] = _fields()
    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.05
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch_size: int | None = None
    batching: Batching = "shuffled"
    optimizer: str = "adamw_torch"
    loraplus_ratio: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int | None = None
    truncate: bool = False
    loss_on: Literal["completions", "all"] = "completions"
    chat: bool = True
    validation: float = 0.0
    early_stopping: int | None = None
    save_every: int | None = None
    keep_checkpoints: int = 2
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    quantize: Literal["nf4", "int8"] | None = None
    double_quant: bool = True
    attention: str | None = None
    gradient_checkpointing: bool = False
    seed: int = 0
    report_to: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoraRecipe(Recipe):
    """LoRA (arXiv 2106.09685) on every linear of the decoder layers."""

    adapter: Mapping[str, Any] = _fields(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


@dataclass(frozen=True)
class DoraRecipe(Recipe):
    """DoRA (arXiv 2402.09353)."""

    adapter: Mapping[str, Any] = _fields(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


@dataclass(frozen=True)
class MixLoraRecipe(Recipe):
    """MixLoRA (arXiv 2404.15159): LoRA experts in the feed-forward blocks, LoRA on attention.

    How many experts serve a token follows from the routing strategy: two, by default.
    """

    adapter: Mapping[str, Any] = _fields(r=16, lora_alpha=32, num_experts=8, router_aux_loss_coef=0.001)


@dataclass(frozen=True)
class MixDoraRecipe(MixLoraRecipe):
    """MixLoRA whose experts and attention adapters are DoRA."""

    adapter: Mapping[str, Any] = _fields(r=16, lora_alpha=32, num_experts=8, router_aux_loss_coef=0.001, use_dora=True)


@dataclass(frozen=True)
class RsLoraRecipe(Recipe):
    """rsLoRA (arXiv 2312.03732): LoRA scaled by alpha / sqrt(r), so that a larger rank does not learn slower."""

    learning_rate: float = 1e-4
    adapter: Mapping[str, Any] = _fields(
        peft_type="LORA", r=16, lora_alpha=16, use_rslora=True, target_modules="all-linear"
    )


@dataclass(frozen=True)
class PissaRecipe(Recipe):
    """PiSSA (arXiv 2404.02948): starts from the base's principal components, and leaves the rest in the base.

    What is saved is a plain LoRA of twice the rank on the base as it was.
    """

    learning_rate: float = 1e-4
    adapter: Mapping[str, Any] = _fields(
        peft_type="LORA", r=16, lora_alpha=16, init_lora_weights="pissa", target_modules="all-linear"
    )


@dataclass(frozen=True)
class LoftqRecipe(Recipe):
    """LoftQ (arXiv 2310.08659): starts where LoRA makes up for the rounding of an NF4 base."""

    quantize: Literal["nf4", "int8"] | None = "nf4"
    double_quant: bool = False
    adapter: Mapping[str, Any] = _fields(peft_type="LORA", r=16, lora_alpha=16, target_modules="all-linear")


@dataclass(frozen=True)
class AdaLoraRecipe(Recipe):
    """AdaLoRA (arXiv 2303.10512): starts at rank `init_r`, and keeps the ranks that matter, `target_r` on average.

    By default the ranks stay until a tenth of the run, and are settled for its last third (`tinit`, `tfinal`).
    """

    learning_rate: float = 1e-3
    adapter: Mapping[str, Any] = _fields(
        peft_type="ADALORA", init_r=12, target_r=8, lora_alpha=32, target_modules="all-linear"
    )


@dataclass(frozen=True)
class FourierFtRecipe(Recipe):
    """FourierFT (arXiv 2405.03003): learns a few coefficients of the update's spectrum."""

    learning_rate: float = 1e-3
    adapter: Mapping[str, Any] = _fields(
        peft_type="FOURIERFT", n_frequency=1000, scaling=150.0, target_modules="all-linear"
    )


@dataclass(frozen=True)
class VeraRecipe(Recipe):
    """VeRA (arXiv 2310.11454): frozen random matrices, shared by all layers; two vectors a layer learn."""

    learning_rate: float = 4e-3
    adapter: Mapping[str, Any] = _fields(peft_type="VERA", r=256, target_modules="all-linear")


@dataclass(frozen=True)
class PeftRecipe(Recipe):
    """Any causal-LM method of PEFT: `peft_type` names it, the other fields are its configuration's."""

    adapter: Mapping[str, Any] = _fields()


RECIPES: dict[str, type[Recipe]] = {
    "lora": LoraRecipe,
    "dora": DoraRecipe,
    "mixlora": MixLoraRecipe,
    "mixdora": MixDoraRecipe,
    "rslora": RsLoraRecipe,
    "pissa": PissaRecipe,
    "loftq": LoftqRecipe,
    "adalora": AdaLoraRecipe,
    "fourierft": FourierFtRecipe,
    "vera": VeraRecipe,
    "peft": PeftRecipe,
}
OURS = ("lora", "dora", "mixlora", "mixdora")
"""Trained by minilora_hub's own modules; the others by PEFT's."""
