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

DTYPES = ("float32", "bfloat16", "int8")
"""Dtypes for answering on a CPU, by the names on the command line."""


def require_dtype(dtype: str | None) -> None:
    """Check a dtype that a user has named; None is the default.

    Raises:
        ValueError: it is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")


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
        dtype: of its weights, or ``"int8"`` for linears of int8 weights over bfloat16 on a CPU; see `int8_linear`.
            Default: the dtype of its checkpoint.
        device: where to move it. Default: where `from_pretrained` puts it.
        progress: called with a line before and after loading.
        **arguments: passed to `from_pretrained` (`quantization_config`, …).

    Raises:
        BaseModelError: it cannot be loaded, or its checkpoint lacks a tensor; the message names it.
        ValueError: ``"int8"`` on a device that is not a CPU, or of a base without plain linears.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from minilora_hub.remote_code.base_loading import load_checked

    in_int8 = dtype == "int8"
    if in_int8 and device is not None and torch.device(device).type != "cpu":
        raise ValueError(f"dtype='int8' on {device}: is for CPUs; use another dtype")
    started = time.perf_counter()
    progress(f"Loading the base {base.name!r} …")
    try:
        with quiet_libraries():
            wanted = torch.bfloat16 if in_int8 else dtype
            model = load_checked(AutoModelForCausalLM, base.path, trust_remote_code=False, dtype=wanted, **arguments)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"base {base.name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if device is not None:
        model.to(device)
    count = model.num_parameters()  # of which a quantizer may have packed several into one number
    size = f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
    if in_int8:
        from minilora_hub.bases.int8_linear import store_in_int8

        store_in_int8(model)
    if model.device.type == "cpu" and model.dtype is torch.bfloat16 and not _has_bfloat16():
        progress("  ! this processor has no instructions for bfloat16: float32 is probably faster")
    progress(f"  {size} parameters on {model.device} ({time.perf_counter() - started:.1f} s)")
    return model


def _has_bfloat16() -> bool:
    import torch

    known = torch.cpu.get_capabilities()
    return known["architecture"] != "x86_64" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))


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
