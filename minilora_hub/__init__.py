"""MixLoRA and DoRA adapters that load from the Hugging Face Hub with one line.

Importing this package loads neither torch nor transformers: a public name is imported when it is first used.

    import minilora_hub
    minilora_hub.register()                     # the Auto classes of transformers now know both adapter types
    model = AutoModelForCausalLM.from_pretrained("user/adapter")
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from minilora_hub.compare.engine import CompareEngine as CompareEngine
    from minilora_hub.integrations.peft.method import MixLoraPeftConfig as MixLoraPeftConfig
    from minilora_hub.integrations.transformers import register as register
    from minilora_hub.publish.push.push import push as push
    from minilora_hub.remote_code.configuration_minilora import DoraConfig as DoraConfig
    from minilora_hub.remote_code.configuration_minilora import MixLoraConfig as MixLoraConfig
    from minilora_hub.remote_code.modeling_minilora import DoraForCausalLM as DoraForCausalLM
    from minilora_hub.remote_code.modeling_minilora import DoraModel as DoraModel
    from minilora_hub.remote_code.modeling_minilora import MixLoraForCausalLM as MixLoraForCausalLM
    from minilora_hub.remote_code.modeling_minilora import MixLoraModel as MixLoraModel
    from minilora_hub.training.run import train as train

_MODULES = {
    "CompareEngine": "minilora_hub.compare.engine",
    "DoraConfig": "minilora_hub.remote_code.configuration_minilora",
    "DoraForCausalLM": "minilora_hub.remote_code.modeling_minilora",
    "DoraModel": "minilora_hub.remote_code.modeling_minilora",
    "MixLoraConfig": "minilora_hub.remote_code.configuration_minilora",
    "MixLoraForCausalLM": "minilora_hub.remote_code.modeling_minilora",
    "MixLoraModel": "minilora_hub.remote_code.modeling_minilora",
    "MixLoraPeftConfig": "minilora_hub.integrations.peft.method",
    "push": "minilora_hub.publish.push.push",
    "register": "minilora_hub.integrations.transformers",
    "train": "minilora_hub.training.run",
}

__all__ = ["__version__", *sorted(_MODULES)]


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None and re.fullmatch(r"(Dora|MixLora)For\w+", name):  # for bases with other heads
        module = _MODULES["DoraModel"]
    if module is None:
        raise AttributeError(f"module 'minilora_hub' has no attribute {name!r}")
    if module.startswith("minilora_hub.remote_code"):
        # The published code has no base aliases; "embedded" is ours.
        from minilora_hub.integrations.transformers import add_base_aliases

        add_base_aliases()
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
