"""Registration with transformers' Auto classes and with PEFT, so that adapters load without `trust_remote_code`."""

from __future__ import annotations

import transformers
from transformers import AutoConfig

from minilora_hub.bases.resolving import EMBEDDED, resolve_base
from minilora_hub.remote_code.adapter_files import BASE_ALIASES
from minilora_hub.remote_code.heads import HEADS
from minilora_hub.remote_code.modeling_minilora import KINDS, adapted_class


def register() -> None:
    """Register `mixlora` and `dora` with AutoConfig and the Auto classes of models, and `MIXLORA` with PEFT.

    Afterwards adapters load with the installed classes: no trust flag is needed, and code in the repo is not run.
    Repeated calls have no effect.

    Raises:
        MiniLoraError: this version of PEFT is not known.
    """
    # Not above: importing PEFT takes seconds, and what is below needs none of it.
    from minilora_hub.integrations import trl
    from minilora_hub.integrations.peft import method as peft_method

    for prefix, (config, _) in KINDS.items():
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for name in HEADS:
            getattr(transformers, name).register(config, adapted_class(prefix, name), exist_ok=True)
    add_base_aliases()
    peft_method.register()
    trl.register()


def add_base_aliases() -> None:
    """Make the published code find the base called "embedded"."""
    BASE_ALIASES[EMBEDDED] = lambda: str(resolve_base(EMBEDDED).path)
