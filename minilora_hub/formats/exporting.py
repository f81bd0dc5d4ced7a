"""From an adapter of ours to the formats that other engines read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import AdapterFolder, read_folder
from minilora_hub.adapter_folder.reading import read_ours
from minilora_hub.adapter_folder.writing import require_free, whole_folder
from minilora_hub.bases.skeleton import BaseSource, find_base
from minilora_hub.errors import AdapterError
from minilora_hub.formats.dense import DType, export_dense
from minilora_hub.formats.mixlora_writing import write_reference
from minilora_hub.formats.moe import MoePlan, export_moe, plan_moe
from minilora_hub.formats.peft import peft_targets, write_peft_folder

Target = Literal["peft", "dense", "mixtral", "moe", "mixlora"]


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        folder: the folder.
        to: the format.
        notes: what the user should know, a line each.
    """

    folder: Path
    to: str
    notes: tuple[str, ...] = ()


def export_adapter(
    source: str | Path,
    out: str | Path,
    to: Target,
    *,
    base: str | None = None,
    dtype: DType = "auto",
    dequantize: bool = False,
    announce: Callable[[MoePlan], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write an adapter in another format.

    Args:
        source: the adapter's folder.
        out: a folder that is empty, or not there yet. It appears whole or not at all.
        to: ``"peft"``, ``"dense"``, ``"mixtral"``, ``"moe"`` (the mixture of experts of the base's family) or
            ``"mixlora"`` (the reference format).
        base: load the base from there. Default: what the adapter names.
        dtype: of the checkpoint, for ``"dense"``, ``"mixtral"`` and ``"moe"``.
        dequantize: for ``"dense"``: whether a quantised base may be dequantised.
        announce: told what will be written, before it is, for ``"mixtral"`` and ``"moe"``.
        progress: told (parts written, parts in all), for the same.

    Raises:
        AdapterError: the adapter has no place in that format; the message says why. Nothing is written then.
    """
    require_free(out)
    if to == "dense":
        return Exported(Path(out), to, tuple(export_dense(source, out, base=base, dtype=dtype, dequantize=dequantize)))
    found = read_folder(source)
    if found.dialect != "minilora":
        what = {"peft": "in PEFT's format", "reference": "in the reference format", "checkpoint": "a whole model"}
        raise AdapterError(
            f"{found.folder.name!r} is {what.get(found.dialect, found.dialect)}: --to {to} takes an adapter in our "
            "format, which `minilora import` makes"
        )
    located = find_base(*found.named_base(base))
    config, tensors, sites = read_ours(found, located)
    if to in ("mixtral", "moe"):
        return _to_moe(found, located, Path(out), to, base, dtype, announce, progress)
    if to == "mixlora" and found.method != "mixlora":
        raise AdapterError(
            f"adapter {found.folder.name!r} is a {found.method}: the reference format holds MixLoRA only"
        )
    if to == "peft" and found.method == "mixlora":
        return _to_peft_mixlora(found, located, Path(out))
    with whole_folder(out) as folder:
        if to == "peft":
            named = located.hub_id or located.name
            targets = peft_targets(sites, located.skeleton)
            write_peft_folder(folder, config, tensors, targets, named, located.commit)
            notes = []
        else:
            notes = write_reference(folder, config, tensors, located)
        notes += write_companions(folder, found.folder, located)
    return Exported(Path(out), to, tuple(notes))


def _to_moe(
    found: AdapterFolder,
    located: BaseSource,
    out: Path,
    to: str,
    base: str | None,
    dtype: DType,
    announce: Callable[[MoePlan], None] | None,
    progress: Callable[[int, int], None] | None,
) -> Exported:
    import torch

    from minilora_hub import MixLoraForCausalLM

    if found.method != "mixlora":
        raise AdapterError(f"adapter {found.folder.name!r} is a {found.method}: it merges into its base, --to dense")
    wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = MixLoraForCausalLM.from_pretrained(str(found.folder), base_model=base, dtype=wanted)
    only = "MixtralForCausalLM" if to == "mixtral" else None
    if announce is not None:
        announce(plan_moe(model, only))
    notes = export_moe(model, out, companions=found.folder, base=located, only=only, progress=progress)
    return Exported(out, to, tuple(notes))


def _to_peft_mixlora(found: AdapterFolder, located: BaseSource, out: Path) -> Exported:
    """A MixLoRA as the PEFT method of minilora_hub."""
    from minilora_hub.formats.peft_mixlora import to_peft_layout

    with whole_folder(out) as folder:
        to_peft_layout(found.folder, folder)
        notes = write_companions(folder, found.folder, located)
    note = "PEFT reads it where minilora_hub is installed and minilora_hub.register() was called; stock PEFT does not"
    return Exported(out, "peft", (note, *notes))
