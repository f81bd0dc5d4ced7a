"""The columns of a comparison: a base and adapters on it, all over one set of base weights in memory."""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilora_hub.bases import resolve_base
from minilora_hub.errors import AdapterError

Kind = Literal["base", "LoRA", "DoRA", "MixLoRA"]
Progress = Callable[[str], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Column:
    """One model of a comparison.

    Attributes:
        name: what it is called on screen.
        kind: the method.
        model: a causal language model with transformers' forward signature.
        parameters_added: parameters the adapter adds to the base; 0 for the base itself.
        detail: one short line about it, e.g. ``"r 16, 8 experts, 2 active"``.
    """

    name: str
    kind: Kind
    model: nn.Module
    parameters_added: int = 0
    detail: str = ""


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a model's tree of modules, sharing every parameter and buffer with the original.

    An adapter that is put onto the copy replaces modules in the copy only, so several adapters sit on one base at the
    memory of one. Config, generation config and hooks are the copy's own. What is written *into* a shared tensor shows
    in both, as it must.

    Args:
        model: any module; quantised parameters are shared like plain ones.

    Returns:
        The copy, of the same class.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class FoundAdapter:
    """An adapter on this machine: the `name` it was asked for by, on screen, and its `folder`."""

    name: str
    folder: Path


def find_adapter(name: str | Path) -> FoundAdapter:
    """Find an adapter by its folder or its id on the Hub, which is fetched; nothing of it is run.

    Raises:
        AdapterError: there is none, or it is of no known kind.
    """
    folder = Path(name)
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        adapter_type(folder)
        return FoundAdapter(folder.resolve().name, folder)
    from minilora_hub.publish.discover import pull

    try:
        folder = pull(str(name))
    except AdapterError as error:
        raise AdapterError(f"adapter {str(name)!r}: there is no such folder, and on the Hub: {error}") from None
    adapter_type(folder)
    return FoundAdapter(str(name).rpartition("/")[2], folder)


def load_columns(
    base: nn.Module, name: str, adapters: Sequence[FoundAdapter | Column], progress: Progress
) -> list[Column]:
    """Put each adapter onto its own shared copy of `base`.

    Args:
        base: the base model. It is left as it is: the base's column is a shared copy, too.
        name: what the base is called on screen.
        adapters: adapters that were found, or columns that are ready.
        progress: called with a line about each column.

    Returns:
        The base's column, then one for each adapter.

    Raises:
        ValueError: an adapter is damaged or does not fit the base; the message names the tensor or the field.
    """
    columns = [Column(name, "base", shared_copy(base).eval(), detail=f"{_millions(_size(base))} parameters")]
    for adapter in adapters:
        started = time.perf_counter()
        column = adapter if isinstance(adapter, Column) else load_adapter(adapter, shared_copy(base))
        column.model.eval()
        columns.append(column)
        progress(f"  + {column.name}: {column.kind}, {column.detail} ({time.perf_counter() - started:.1f} s)")
    return columns


def adapter_type(folder: Path) -> str:
    """Tell what an adapter folder holds, without loading it.

    Returns:
        ``"mixlora"`` or ``"dora"`` (our format), or ``"peft"`` (LoRA in PEFT's).

    Raises:
        AdapterError: the folder is missing or holds no adapter of a known kind.
    """
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    if (folder / "adapter_config.json").is_file():
        method = _read_json(folder / "adapter_config.json").get("peft_type")
        if method != "LORA":
            raise AdapterError(f"adapter {str(folder)!r}: peft_type={method!r} in adapter_config.json, must be 'LORA'")
        if not (folder / "adapter_model.safetensors").is_file():
            raise AdapterError(f"adapter {str(folder)!r}: no adapter_model.safetensors")
        return "peft"
    model_type = _read_json(folder / "config.json").get("model_type")
    if model_type not in ("mixlora", "dora"):
        raise AdapterError(
            f"adapter {str(folder)!r}: model_type={model_type!r} in config.json, must be 'mixlora' or 'dora'"
        )
    return model_type


def load_adapter(adapter: FoundAdapter, base: nn.Module) -> Column:
    """Load one adapter onto `base`, which it takes over, with our own classes: no code from its folder runs.

    Args:
        adapter: its folder holds ``config.json`` with model type ``mixlora`` or ``dora``, or PEFT's
            ``adapter_config.json`` of a LoRA.
        base: the module that the adapter's layers go into.

    Raises:
        AdapterError: the folder is missing or holds no adapter of a known kind.
        ValueError: the adapter is damaged or does not fit the base.
    """
    folder = adapter.folder
    found = adapter_type(folder)
    if found == "peft":
        return _load_peft_lora(adapter, base)

    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    model_class = MixLoraForCausalLM if found == "mixlora" else DoraForCausalLM
    # An adapter stored in bf16 is computed in the base's dtype: on a CPU that is quicker than changing dtype per layer.
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point()), None)
    model = model_class.from_pretrained(str(folder), base_model=base, dtype=dtype)
    config = model.config
    detail = f"r {config.r}"
    if found == "mixlora":
        top_p = config.routing_strategy == "top_p"
        active = f"top-p {config.router_top_p:g}" if top_p else f"{config.num_experts_per_tok} active"
        detail += f", {config.num_experts} experts, {active}"
    kind: Kind = "MixLoRA" if found == "mixlora" else "DoRA"
    return Column(adapter.name, kind, model, model.num_adapter_parameters(), detail)


def _load_peft_lora(adapter: FoundAdapter, base: nn.Module) -> Column:
    """Load plain LoRA in PEFT's format; it needs no class of ours."""
    from peft import PeftModel

    settings = _read_json(adapter.folder / "adapter_config.json")
    size = _size(base)
    model = PeftModel.from_pretrained(base, str(adapter.folder))
    kind: Kind = "DoRA" if settings.get("use_dora") else "LoRA"
    return Column(adapter.name, kind, model, _size(model) - size, f"r {settings.get('r')}")


def load_base(
    base: str | Path, device: str | torch.device, dtype: torch.dtype | None, progress: Progress
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    """Load a base by name or folder; its own remote code stays off.

    Returns:
        The model, its tokenizer, and what it is called on screen.
    """
    started = time.perf_counter()
    progress(f"Loading the base {str(base)!r} …")
    resolved = resolve_base(base)
    # On a CPU, fp32 is both the quickest and the exact choice; elsewhere the checkpoint's own dtype.
    wanted = dtype or (torch.float32 if torch.device(device).type == "cpu" else "auto")
    model: Any = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=wanted)
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(resolved.path)
    progress(f"  {_millions(_size(model))} parameters on {device} ({time.perf_counter() - started:.1f} s)")
    return model, tokenizer, (resolved.hub_id or resolved.path.name).rpartition("/")[2]


def shipped_adapters() -> list[Path]:
    """Find the adapters that travel with minilora_hub: in an installed wheel or in a checkout.

    Raises:
        AdapterError: there are none, so there is nothing to compare.
    """
    package = Path(__file__).resolve().parents[1]
    for cards in (package / "model_cards", package.parent / "model_cards"):
        found = sorted(path.parent for path in cards.glob("*/config.json") if "auto_map" in _read_json(path))
        if found:
            return found
    raise AdapterError("this copy of minilora_hub ships no adapters: name the folders of your own")


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"adapter {str(path.parent)!r}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{str(path)!r}: must hold a JSON object")
    return content


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
