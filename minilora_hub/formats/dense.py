"""A base with a LoRA or DoRA merged into its weights: an ordinary checkpoint that every engine reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from minilora_hub.errors import AdapterError
from minilora_hub.formats.base_source import BaseSource, find_base, hub_name
from minilora_hub.formats.checkpoint import require_space, write_card
from minilora_hub.formats.folders import AdapterFolder, copy_companions, read_folder
from minilora_hub.formats.output import require_free, whole_folder
from minilora_hub.quiet import quiet_libraries

DType = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def export_dense(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: DType = "auto",
    dequantize: bool = False,
    max_shard_size: str = "5GB",
) -> Path:
    """Merge a LoRA or DoRA into its base and write the result as a normal checkpoint.

    The merge is computed in float32; the result has the dtype that is asked for.

    Args:
        source: the adapter's folder: a DoRA of ours, or LoRA or DoRA in PEFT's format.
        out: a folder that is empty, or not there yet. It appears whole or not at all.
        base: the base. Default: the one that the adapter names.
        dtype: of the result; ``"auto"`` for the one of the base's checkpoint.
        dequantize: whether a base whose checkpoint is quantised may be dequantised; the result is then a large one.
        max_shard_size: largest file of weights, as ``save_pretrained`` takes it.

    Returns:
        The folder.

    Raises:
        AdapterError: the adapter is a MixLoRA, its base is quantised and `dequantize` is off, or they do not fit.
    """
    require_free(out)
    if dtype not in DTYPES:
        raise AdapterError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    found = read_folder(source)
    if found.method == "mixlora":
        raise AdapterError(
            f"adapter {found.folder.name!r} is a MixLoRA: every token takes its own experts, so it cannot be merged; "
            "--to moe writes it as a mixture of experts"
        )
    if found.dialect == "checkpoint":
        raise AdapterError(f"{found.folder.name!r} is a whole model ({found.method}), not an adapter")
    located = find_base(found.base, base, found.config.get("base_model_revision") or found.config.get("revision"))
    wanted = _dtype(located.config, dtype)
    model = _plain_base(located, dequantize)
    require_space(out, sum(parameter.numel() for parameter in model.parameters()) * wanted.itemsize)
    merged = _merged(found, model).to(wanted)
    merged.config.dtype = wanted
    with whole_folder(out) as folder:
        # A dequantised model still remembers how its checkpoint was packed, and cannot pack it again.
        quantised = getattr(located.config, "quantization_config", None) is not None
        with quiet_libraries():
            merged.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not quantised)
        if not copy_companions(found.folder, folder):
            located.save_companions(folder)
        _write_card(folder, found, located, str(wanted).removeprefix("torch."))
    return Path(out)


def _dtype(config: Any, asked: DType) -> Any:
    import torch

    if asked != "auto":
        return getattr(torch, asked)
    named = getattr(config, "dtype", None)
    named = getattr(torch, named) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) else torch.float32


def _plain_base(base: BaseSource, dequantize: bool) -> Any:
    """The base with open weights, in float32."""
    import torch

    quantised = getattr(base.config, "quantization_config", None)
    if quantised is None:
        return base.load(torch.float32)
    settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = settings.get("quant_method", "unknown")
    if not dequantize:
        raise AdapterError(
            f"base {base.name!r} is quantised ({getattr(method, 'value', method)}): merging needs its weights open; "
            "pass dequantize=True (--dequantize), or another base= (--base), such as the one it was made from"
        )
    model = base.load(torch.float32)
    model = model.dequantize()
    return model.float()


def _merged(found: AdapterFolder, model: Any) -> Any:
    """The base with the adapter in its weights; takes over `model`."""
    if found.dialect == "minilora":
        from minilora_hub import DoraForCausalLM

        return DoraForCausalLM.from_pretrained(str(found.folder), base_model=model).merge()
    from minilora_hub.formats.peft import with_peft

    try:
        return with_peft(model, found.folder).merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"adapter {found.folder.name!r} does not fit the base: {error}") from error


def _write_card(folder: Path, found: AdapterFolder, base: BaseSource, dtype: str) -> None:
    named = hub_name(base.name)
    method = {"lora": "LoRA", "dora": "DoRA"}[found.method]
    lines = [
        f"`{named or 'A local base'}` with a {method} adapter merged into its weights by `minilora export`, in "
        f"{dtype}; the merge was computed in float32. It is an ordinary checkpoint: no adapter library and no remote "
        "code are needed.",
        "What the base's and the adapter's licences allow holds here, too.",
    ]
    snippet = (
        'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("this/repo")'
    )
    facts = {
        "base_model": named,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": [found.method, "minilora-export"],
    }
    write_card(folder, f"A base with a {method} merged into it", facts, lines, snippet)
