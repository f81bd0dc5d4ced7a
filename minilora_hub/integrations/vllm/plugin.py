"""Entry point of the vLLM plugin. It does nothing with versions of vLLM that it was not tested with.

The plugin replaces vLLM's LoRA layers and managers with subclasses. These depend on vLLM's internals, which change with
every version, so with an untested version nothing is replaced.
"""

from __future__ import annotations

import logging

TESTED_VERSIONS = ("0.32.0",)

logger = logging.getLogger("vllm.minilora_hub")


def register() -> None:
    """Register both adapter types as models, and make ``--enable-lora`` accept them; vLLM calls this in every process.

    A second call changes nothing. With an untested version of vLLM it only logs one line.
    """
    import vllm

    version = vllm.__version__.partition("+")[0]
    if version not in TESTED_VERSIONS:
        logger.warning(
            "minilora_hub: the plugin is off, since it was not tested with vLLM %s (tested: %s)",
            vllm.__version__,
            ", ".join(TESTED_VERSIONS),
        )
        return
    register_models()
    if takes_dora():
        logger.warning("minilora_hub: this vLLM serves DoRA itself; the plugin leaves --enable-lora to it")
        return
    from minilora_hub.integrations.vllm.adapter_manager import install

    install()


def register_models() -> None:
    """Make ``vllm serve user/adapter`` load the base that the adapter names, with the adapter in its weights."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from minilora_hub.integrations.vllm.model_size import register_size
    from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig

    register_size()
    for config in (DoraConfig, MixLoraConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in ("DoraForCausalLM", "MixLoraForCausalLM"):
        ModelRegistry.register_model(name, f"minilora_hub.integrations.vllm.served_models:{name}")


def takes_dora() -> bool:
    """Whether this vLLM accepts ``use_dora`` in an adapter_config.json by itself."""
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper(r=1, lora_alpha=1, target_modules=[], use_dora=True)
    return not any("DoRA" in problem for problem in helper._validate_features())
