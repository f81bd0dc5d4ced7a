"""Merge a LoRA or DoRA into its base, which gives an ordinary checkpoint that every engine can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import only_ours, read_folder
from minilora_hub.adapter_folder.reading import notes_on_base
from minilora_hub.bases.skeleton import BaseSource, find_base, hub_name
from minilora_hub.errors import AdapterError
from minilora_hub.formats.checkpoint import require_space, write_card
from minilora_hub.formats.reading import read_adapter
from minilora_hub.quiet import quiet_libraries
from minilora_hub.remote_code.attach import build_modules, weight_holders
from minilora_hub.whole_folders import require_free, whole_folder

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
) -> list[str]:
    """Merge a LoRA or DoRA into its base and write the result as an ordinary checkpoint.

    The merge is computed in float32 and cast to the requested dtype. If the adapter is on the head and the base ties
    the head to the embeddings, the checkpoint stores both, untied.

    Args:
        source: the adapter's folder: a DoRA in our format, or a LoRA or DoRA in PEFT's format.
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        base: the base. Default: the one that the adapter names.
        dtype: dtype of the result; ``"auto"`` for that of the base's checkpoint.
        dequantize: whether a quantised base may be dequantised, which makes the result larger.
        max_shard_size: maximum size of a weights file, as in ``save_pretrained``.

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: the adapter is a MixLoRA, its base is quantised and `dequantize` is off, or they do not fit.
    """
    require_free(out)
    if dtype not in DTYPES:
        raise AdapterError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
    found = read_folder(source)
    if found.method == "mixlora":
        raise AdapterError(
            f"adapter {found.name!r} is a MixLoRA: its active experts vary by token, so it cannot be merged"
            + "; --to moe writes it as a mixture of experts" * (only_ours(found.config) is None)
        )
    if found.dialect == "checkpoint":
        raise AdapterError(f"{found.name!r} is a whole model ({found.method}), not an adapter")
    located = find_base(*found.named_base(base))
    wanted = _dtype(located.config, dtype)
    adapter = read_adapter(found, located)  # read first, because loading the base takes long
    model = _plain_base(located, dequantize)
    notes = [*notes_on_base(located, found), *_merge(model, *adapter)]
    require_space(out, sum(parameter.numel() for parameter in model.parameters()) * wanted.itemsize)
    model.to(wanted)
    model.config.dtype = wanted
    with whole_folder(out) as folder:
        # A dequantised model still refers to the quantised format of its checkpoint, in which it cannot be saved.
        quantised = getattr(located.config, "quantization_config", None) is not None
        with quiet_libraries():
            model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=not quantised)
        notes += write_companions(folder, found.folder, located)
        method = {"lora": "LoRA", "dora": "DoRA"}[found.method]
        text = (
            f"A base with a {method} adapter merged into its weights by `minilora export`, in "
            f"{str(wanted).removeprefix('torch.')}; the merge was computed in float32. It is an ordinary checkpoint, "
            "which needs no adapter library and no remote code."
        )
        write_card(folder, f"A base with a {method} merged into it", text, hub_name(located.name), [found.method])
    return notes


def _dtype(config: Any, asked: DType) -> Any:
    if asked != "auto":
        return getattr(torch, asked)
    named = getattr(config, "dtype", None)
    named = getattr(torch, named) if isinstance(named, str) else named
    return named if isinstance(named, torch.dtype) else torch.float32


def _plain_base(base: BaseSource, dequantize: bool) -> Any:
    """Load the base with plain float32 weights."""
    quantised = getattr(base.config, "quantization_config", None)
    if quantised is None:
        return base.load(torch.float32)
    settings = quantised if isinstance(quantised, dict) else quantised.to_dict()
    method = settings.get("quant_method", "unknown")
    if not dequantize:
        raise AdapterError(
            f"base {base.name!r} is quantised ({getattr(method, 'value', method)}): merging needs plain weights; "
            "pass dequantize=True (--dequantize), or the unquantised base with base= (--base)"
        )
    return base.load(torch.float32).dequantize().float()


def _merge(model: Any, config: Any, tensors: dict[str, Any], sites: list[Any]) -> list[str]:
    """Write an adapter into the weights of a base; return notes for the user, one line each.

    Raises:
        AdapterError: a weight is quantised or offloaded, or a module that is not the head shares it.
    """
    notes = []
    holders = weight_holders(model)
    for path, adapted in build_modules(model, config, sites, tensors).items():
        layer = adapted.base_layer
        try:
            weights = adapted.merged_weights()
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
        for name, merged in weights.items():
            held_by = holders[id(getattr(layer, name))]
            if others := [other for other in held_by if not _is_same_place(model, other, path)]:
                _untie_head(model, path, layer, others)
                notes.append(
                    f"{path} is stored separately from {', '.join(others)}, to which the base ties it: the adapter "
                    f"changes only {path} (tie_word_embeddings is false, {merged.numel():,} more parameters)"
                )
            with torch.no_grad():
                getattr(layer, name).copy_(merged)
    return notes


def _is_same_place(model: Any, path: str, other: str) -> bool:
    """Whether two paths lead to the same attribute of the same module, which an adapter replaces for both."""
    (parent, _, name), (other_parent, _, other_name) = path.rpartition("."), other.rpartition(".")
    return name == other_name and model.get_submodule(parent) is model.get_submodule(other_parent)


def _untie_head(model: Any, path: str, layer: Any, others: list[str]) -> None:
    """Give the head a separate weight, and set tie_word_embeddings to False; see `_merge`."""
    if layer is not model.get_output_embeddings():
        raise AdapterError(f"{path}: {', '.join(others)} shares its weight in this base, and would change with it")
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.tie_word_embeddings = False
    if f"{path}.weight" in model.get_expanded_tied_weights_keys(all_submodels=True):
        raise AdapterError(
            f"{path}: {type(model).__name__} always ties it to {', '.join(others)}: an adapter on it cannot be merged"
        )
