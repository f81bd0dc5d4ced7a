"""Load a base from its folder: the model and its tokenizer. The base's own remote code is never run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.errors import BaseModelError
from minilora_hub.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch


def load_base(
    base: ResolvedBase,
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    progress: Callable[[str], None] = lambda line: None,
    **arguments: Any,
) -> Any:
    """Load a base as a causal language model.

    Args:
        base: the base, on this machine.
        dtype: of its weights. Default: the dtype of its checkpoint.
        device: where to move it. Default: where `from_pretrained` puts it.
        progress: called with a line before and after loading.
        **arguments: passed to `from_pretrained` (`quantization_config`, …).

    Raises:
        BaseModelError: it cannot be loaded, or its checkpoint lacks a tensor; the message names it.
    """
    from transformers import AutoModelForCausalLM

    from minilora_hub.remote_code.base_loading import load_checked

    started = time.perf_counter()
    progress(f"Loading the base {base.name!r} …")
    try:
        with quiet_libraries():
            model = load_checked(AutoModelForCausalLM, base.path, trust_remote_code=False, dtype=dtype, **arguments)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base {base.name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if device is not None:
        model.to(device)
    count = sum(parameter.numel() for parameter in model.parameters())
    size = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
    progress(f"  {size} parameters on {model.device} ({time.perf_counter() - started:.1f} s)")
    return model


def load_tokenizer(base: ResolvedBase) -> Any:
    """Load the tokenizer of a base.

    Raises:
        BaseModelError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        with quiet_libraries():
            return AutoTokenizer.from_pretrained(base.path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base {base.name!r}: its tokenizer cannot be loaded: {error}") from error
