"""A vLLM plugin: DoRA and MixLoRA adapters in vLLM, at run time beside LoRAs and as a model of their own.

vLLM calls `plugin.register` through the entry point group ``vllm.general_plugins``. Nothing else here is imported
before that, since every other module imports vLLM, which minilora_hub does not depend on.
"""
