"""Import adapters in other formats into folders that minilora_hub can publish."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from minilora_hub.adapter_folder.companions import common_source
from minilora_hub.adapter_folder.folders import read_folder
from minilora_hub.adapter_folder.reading import notes_on_base
from minilora_hub.adapter_folder.writing import write_ours
from minilora_hub.bases.skeleton import find_base, require_use_of
from minilora_hub.errors import AdapterError
from minilora_hub.formats.combine import read_loras
from minilora_hub.formats.experts_from_loras import OnAttention, Router, experts_from_loras
from minilora_hub.formats.mixlora import ReferenceDora, read_reference
from minilora_hub.formats.peft_conversion import as_dora, write_normalised
from minilora_hub.formats.peft_mixlora import read_peft_mixlora
from minilora_hub.formats.peft_reading import read_peft
from minilora_hub.formats.whole_adapters import whole_adapters
from minilora_hub.seeds import require_seed
from minilora_hub.whole_folders import require_free, whole_folder

Route = Literal["blocks", "all-linears"]


@dataclass(frozen=True)
class Imported:
    """The result of an import.

    Attributes:
        folder: the folder.
        method: ``"lora"``, ``"dora"`` or ``"mixlora"``.
        source: the dialect of the source.
        notes: notes for the user, one line each.
    """

    folder: Path
    method: str
    source: str
    notes: tuple[str, ...] = ()


def import_adapter(
    source: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    reference_dora: ReferenceDora = "loaded",
) -> Imported:
    """Import one adapter: the reference MixLoRA format, or LoRA, rsLoRA and DoRA in PEFT's.

    A MixLoRA or DoRA is converted to our format. A plain LoRA stays in PEFT's format, which stock transformers loads;
    it is checked and rewritten. Both can be pushed. The adapter's tokenizer, chat template and generation settings are
    copied; missing ones are taken from the base.

    Args:
        source: the adapter's folder.
        out: an empty folder, or one that does not exist. It is written completely or not at all.
        base: the base: an id on the Hub, a folder, or ``"embedded"``. Default: the one that the adapter names.
        base_revision: its revision on the Hub.
        reference_dora: ``"loaded"`` or ``"trained"``: see `minilora_hub.formats.mixlora`.

    Raises:
        AdapterError: the adapter is damaged, or has a setting that is not supported; the message names it.
        BaseModelError: the base cannot be read.
    """
    require_free(out)
    found = read_folder(source)
    if found.dialect == "minilora":
        raise AdapterError(f"adapter {found.name!r} is in minilora_hub's own format already: push it as it is")
    if found.dialect == "checkpoint":
        raise AdapterError(f"{found.name!r} is a whole model ({found.method}), not an adapter")
    located = find_base(*found.named_base(base, base_revision))
    require_use_of(base_revision, located)
    if reference_dora != "loaded" and found.dialect != "reference":
        raise AdapterError(f"reference_dora={reference_dora!r}: only applies to the format of the mixlora package")
    notes = notes_on_base(located, found)
    with whole_folder(out) as folder:
        if found.dialect == "peft-mixlora":
            notes += write_ours(folder, *read_peft_mixlora(found, located), located, found.folder)
        elif found.dialect == "reference":
            config, tensors, more = read_reference(found, located, reference_dora)
            notes += more + write_ours(folder, config, tensors, located, found.folder)
        else:
            adapter = read_peft(found, located)
            if found.method == "dora":
                notes += write_ours(folder, *as_dora(adapter), located, found.folder)
            else:
                notes += write_normalised(folder, adapter, found.folder)
    return Imported(Path(out), found.method, found.dialect, tuple(notes))


def import_as_experts(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    num_experts_per_tok: int = 2,
    attention: OnAttention = "same",
    seed: int = 0,
    router: Router = "fresh",
    temperature: float = 1.0,
    route: Route = "blocks",
) -> Imported:
    """Combine several LoRA adapters into one MixLoRA.

    Args: those of one of two functions, by `route`: ``"blocks"`` routes feed-forward blocks
        (`minilora_hub.formats.experts_from_loras`), ``"all-linears"`` every linear (`…whole_adapters`).

    Raises:
        AdapterError: `route` is unknown or does not go with `attention`, an adapter is not a plain LoRA, or
            they are incompatible.
        BaseModelError: the base cannot be read.
        ValueError: the seed is out of range.
    """
    if route not in get_args(Route):
        raise AdapterError(f"route={route!r}: must be one of {', '.join(get_args(Route))}")
    if route == "all-linears" and attention != "same":
        raise AdapterError(f"attention={attention!r}: with route all-linears attention is routed, not combined")
    require_seed(seed)
    require_free(out)
    adapters = read_loras(sources, base, base_revision)
    trained_elsewhere = notes_on_base(adapters[0].base, *map(read_folder, sources))
    given: dict[str, Any] = {"num_experts_per_tok": num_experts_per_tok, "seed": seed}
    given |= {"router": router, "temperature": temperature}
    with whole_folder(out) as folder:
        if route == "all-linears":
            config, tensors, notes = whole_adapters(adapters, **given)
        else:
            config, tensors, notes = experts_from_loras(adapters, attention=attention, **given)
        source = common_source([Path(one) for one in sources])
        notes += write_ours(folder, config, tensors, adapters[0].base, source)
    return Imported(Path(out), "mixlora", "peft", (*notes, *trained_elsewhere))
