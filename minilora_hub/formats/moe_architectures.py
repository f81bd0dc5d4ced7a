"""Mixture-of-experts architectures of transformers that a MixLoRA can be exported to, by the family of its base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SHARED = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id "
    "eos_token_id tie_word_embeddings attention_dropout rope_parameters"
)
"""Fields that every configuration here takes from the base's configuration, if it has them."""
ZERO_WIDTH = 64  # width of Qwen2Moe's shared expert of zeros; engines require a multiple of their block size


@dataclass(frozen=True)
class Architecture:
    """A mixture-of-experts architecture for a family of bases.

    Attributes:
        name: its class.
        config: its configuration class.
        fields: configuration fields taken from the base in addition to `SHARED`.
        own: function that returns its other fields from the adapter's and the base's configuration.
        block: path of the mixture in a layer.
        router: name of the router's weight in the block.
        experts: {gate, up, down: name of an expert's weight in the block, with ``{}`` for its number}.
        biases: fields of the base's configuration that must be off.
    """

    name: str
    config: str
    fields: str = ""
    own: Callable[[Any, Any], dict[str, Any]] = field(default=lambda ours, text: {})
    block: str = "mlp"
    router: str = "gate.weight"
    experts: tuple[str, str, str] = (
        "experts.{}.gate_proj.weight",
        "experts.{}.up_proj.weight",
        "experts.{}.down_proj.weight",
    )
    biases: tuple[str, ...] = ("mlp_bias",)


def _qwen(ours: Any, text: Any) -> dict[str, Any]:
    return {
        "num_experts": ours.num_experts,
        "moe_intermediate_size": text.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    }


def _qwen2(ours: Any, text: Any) -> dict[str, Any]:
    return _qwen(ours, text) | {"shared_expert_intermediate_size": ZERO_WIDTH, "qkv_bias": True}


MIXTRAL = Architecture(
    "MixtralForCausalLM",
    "MixtralConfig",
    fields="sliding_window",
    own=lambda ours, text: {"num_local_experts": ours.num_experts},
    block="block_sparse_moe",
    experts=("experts.{}.w1.weight", "experts.{}.w3.weight", "experts.{}.w2.weight"),
    biases=("attention_bias", "mlp_bias"),
)
QWEN2_MOE = Architecture(
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    fields="use_sliding_window sliding_window max_window_layers layer_types",
    own=_qwen2,
)
QWEN3_MOE = Architecture(
    "Qwen3MoeForCausalLM", "Qwen3MoeConfig", fields="use_sliding_window sliding_window attention_bias", own=_qwen
)
FLEX_OLMO = Architecture(
    "FlexOlmoForCausalLM",
    "FlexOlmoConfig",
    fields="attention_bias",
    own=lambda ours, text: {"num_experts": ours.num_experts, "norm_topk_prob": True},
)
GRANITE_MOE = Architecture(
    "GraniteMoeForCausalLM",
    "GraniteMoeConfig",
    fields="attention_bias embedding_multiplier logits_scaling residual_multiplier attention_multiplier",
    own=lambda ours, text: {"num_local_experts": ours.num_experts},
    block="block_sparse_moe",
    router="router.layer.weight",
    experts=("input_linear.weight", "", "output_linear.weight"),  # stacked, the gate above up
)
ARCHITECTURES = {
    "llama": MIXTRAL,
    "mistral": MIXTRAL,
    "qwen2": QWEN2_MOE,
    "qwen3": QWEN3_MOE,
    "olmo2": FLEX_OLMO,
    "granite": GRANITE_MOE,
}
NOT_FITTING = {
    "gemma2": "there is no mixture of experts with four norms per layer",
    "phi": "its feed-forward block has no gate",
    "phi3": "PhiMoE has other norms and routes by another rule",
    "gpt2": "its feed-forward block has no gate",
    "gpt_neox": "its feed-forward block has no gate",
}
