"""What a comparison is made of: finding adapters and loading their base."""

from __future__ import annotations

import copy
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilora_hub.bases import resolve_base
from minilora_hub.compare.reading import KINDS, WEIGHTS, adapter_facts, adapter_type
from minilora_hub.errors import AdapterError
from minilora_hub.formats.code_references import require_no_other_code

Progress = Callable[[str], None]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


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
        AdapterError: there is none, it is of no known kind, or it leads to code elsewhere.
    """
    folder = Path(name)
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        adapter_type(folder)
        require_no_other_code(folder)
        return FoundAdapter(folder.resolve().name, folder)
    from minilora_hub.publish.discover import pull

    try:
        folder = pull(str(name))
    except AdapterError as error:
        raise AdapterError(f"adapter {str(name)!r}: there is no such folder, and on the Hub: {error}") from None
    adapter_type(folder)
    require_no_other_code(folder, str(name))
    return FoundAdapter(str(name).rpartition("/")[2], folder)


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
    model: Any = AutoModelForCausalLM.from_pretrained(resolved.path, dtype=wanted, trust_remote_code=False)
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(resolved.path, trust_remote_code=False)
    progress(f"  {_millions(_size(model))} parameters on {device} ({time.perf_counter() - started:.1f} s)")
    return model, tokenizer, (resolved.hub_id or resolved.path.name).rpartition("/")[2]


def shipped_adapters() -> list[Path]:
    """Find the adapters that travel with minilora_hub: in an installed wheel or in a checkout; the simplest kind first.

    Raises:
        AdapterError: there are none, so there is nothing to compare; or one is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    for cards in (package / "model_cards", package.parent / "model_cards"):
        found = {path.parent: adapter_facts(path.parent).kind for path in sorted(cards.glob(f"*/{WEIGHTS}"))}
        if found:
            return sorted(found, key=lambda folder: KINDS.index(found[folder]))
    raise AdapterError("this copy of minilora_hub ships no adapters: name the folders of your own")


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"
