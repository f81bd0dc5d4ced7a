"""What vLLM needs to know of a MixLoRA before it makes the model: how many experts it has.

vLLM reads the number from the base's part of the configuration, which has no experts; without it, vLLM makes no
process group for experts, and every mixture-of-experts model needs one.
"""

from __future__ import annotations

from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)


class MixLoraSize(ModelArchConfigConvertorBase):
    """Reads the size of a MixLoRA from its configuration."""

    def get_num_experts(self) -> int:
        return int(self.hf_config.num_experts)

    def get_num_experts_per_token(self) -> int:
        return self.hf_config.num_experts_per_tok or 0  # top-p routing has no fixed number


def register_size() -> None:
    """Make vLLM use `MixLoraSize`."""
    MODEL_ARCH_CONFIG_CONVERTORS["mixlora"] = MixLoraSize
