"""Export an adapter in our format to the formats that other engines read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import AdapterFolder, only_ours, read_folder
from minilora_hub.adapter_folder.reading import read_ours
from minilora_hub.bases.skeleton import find_base
from minilora_hub.errors import AdapterError
from minilora_hub.formats.dense import DType, export_dense
from minilora_hub.formats.mixlora_writing import write_reference
from minilora_hub.formats.moe import MoePlan, export_moe
from minilora_hub.formats.peft import peft_targets, write_peft_folder
from minilora_hub.formats.peft_mixlora import write_peft_mixlora
from minilora_hub.remote_code.modeling_minilora import MixLoraForCausalLM
from minilora_hub.whole_folders import require_free, whole_folder

Target = Literal["peft", "dense", "mixtral", "moe", "mixlora"]


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: the folder.
        to: the format.
        notes: notes for the user, one line each.
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
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        to: ``"peft"``, ``"dense"``, ``"mixtral"``, ``"moe"`` (the mixture of experts of the base's family) or
            ``"mixlora"`` (the reference format).
        base: where to load the base from. Default: what the adapter names.
        dtype: dtype of the checkpoint, for ``"dense"``, ``"mixtral"`` and ``"moe"``.
        dequantize: for ``"dense"``: whether a quantised base may be dequantised.
        announce: called with the plan before anything is written, for ``"mixtral"`` and ``"moe"``.
        progress: called with (parts written, total parts), for ``"mixtral"`` and ``"moe"``.

    Raises:
        AdapterError: the format cannot represent the adapter; the message says why. Nothing is written then.
    """
    require_free(out)
    if to == "dense":
        return Exported(Path(out), to, tuple(export_dense(source, out, base=base, dtype=dtype, dequantize=dequantize)))
    found = read_folder(source)
    if refusal := _refusal(found, to):
        raise AdapterError(f"{found.name!r} is {refusal}")
    located = find_base(*found.named_base(base))
    config, tensors, sites = read_ours(found, located)
    if to in ("mixtral", "moe"):
        model = MixLoraForCausalLM.from_pretrained(str(found.folder), base_model=base, dtype=dtype)
        only = "MixtralForCausalLM" if to == "mixtral" else None
        notes = export_moe(model, out, found.folder, located, only=only, announce=announce, progress=progress)
        return Exported(Path(out), to, tuple(notes))
    with whole_folder(out) as folder:
        if to == "mixlora":
            notes = write_reference(folder, config, tensors, located)
        elif found.method == "mixlora":
            notes = write_peft_mixlora(folder, config, tensors, sites, located)
        else:
            named = located.hub_id or located.name
            targets = peft_targets(sites, located.skeleton)
            write_peft_folder(folder, config, tensors, targets, named, located.commit)
            notes = []
        notes += write_companions(folder, found.folder, located)
    return Exported(Path(out), to, tuple(notes))


def _refusal(found: AdapterFolder, to: Target) -> str | None:
    """Return what an adapter is, and why it cannot be exported `to` a format other than ``"dense"``; None if it can."""
    if found.dialect == "checkpoint":
        return "a whole model, not an adapter: there is nothing to export"
    if to == "peft" and found.dialect == "peft":
        return "in PEFT's format already"
    if to != "peft" and found.method != "mixlora":
        return f"a {found.method}: --to {to} takes a MixLoRA only; --to dense merges a LoRA or DoRA into its base"
    if field := only_ours(found.config):
        return f"a MixLoRA with {field}, which --to {to} has no place for: only our own format has"
    if found.dialect != "minilora":
        return f"a MixLoRA in the format {found.dialect!r}: convert it with `minilora import` first"
    return None
