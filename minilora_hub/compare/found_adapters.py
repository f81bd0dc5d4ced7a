"""Find the adapters of a comparison, and share one base among them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from minilora_hub.adapter_folder.folders import KINDS, adapter_facts, read_source
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.errors import AdapterError
from minilora_hub.hub.client import fetch

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def shared_copy(model: nn.Module) -> nn.Module:
    """Copy a model's tree of modules, sharing every parameter and buffer with the original.

    An adapter on the copy replaces modules in the copy only, so several adapters can share the memory of one base.
    Config, generation config and hooks are copied. A write into a shared tensor changes both.

    Args:
        model: any module; quantised parameters are shared like plain ones.

    Returns:
        The copy, of the same class.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@dataclass(frozen=True)
class FoundAdapter:
    """A local adapter: its display `name` and its `folder`."""

    name: str
    folder: Path


def find_adapter(name: str | Path) -> FoundAdapter:
    """Find an adapter by its folder or its Hub id, which is downloaded; none of its code runs.

    Raises:
        AdapterError: it does not exist, is of no known kind, or refers to code of another repo.
    """
    folder = Path(name)
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        read_source(folder)
        return FoundAdapter(folder.resolve().name, folder)
    try:
        folder, _ = fetch(str(name), revision=None, token=None, progress=True)
    except AdapterError as error:
        raise AdapterError(f"adapter {str(name)!r}: there is no such folder, and on the Hub: {error}") from None
    read_source(folder, str(name))
    return FoundAdapter(str(name).rpartition("/")[2], folder)


def find_adapters(names: Iterable[str | Path]) -> list[FoundAdapter]:
    """Find adapters like `find_adapter`, with unique names: ``a/run`` and ``b/run`` instead of ``run`` twice.

    Raises:
        AdapterError: one does not exist, or is of no known kind.
        ValueError: one is named twice.
    """
    asked = [str(name) for name in names]
    found = [find_adapter(name) for name in asked]
    folders = [adapter.folder.resolve() for adapter in found]
    if twice := {name for name, folder in zip(asked, folders, strict=True) if folders.count(folder) > 1}:
        raise ValueError(f"adapters={sorted(twice)}: each adapter must be given only once")
    # As many of the last parts of its path as make it unique; a Hub id has two.
    paths = [
        folder.parts if Path(name).is_dir() else tuple(name.split("/"))
        for name, folder in zip(asked, folders, strict=True)
    ]
    shown = [adapter.name for adapter in found]
    for length in range(2, max(map(len, paths), default=0) + 1):
        shown = [
            "/".join(path[-length:]) if shown.count(name) > 1 else name for name, path in zip(shown, paths, strict=True)
        ]
    return [replace(adapter, name=name) for adapter, name in zip(found, shown, strict=True)]


def shipped_adapters() -> list[Path]:
    """Find the adapters that are shipped with minilora_hub, in the wheel or the checkout; the simplest kind first.

    Raises:
        AdapterError: there are none, or one is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    for cards in (package / "model_cards", package.parent / "model_cards"):
        found = {path.parent: adapter_facts(path.parent).kind for path in sorted(cards.glob(f"*/{WEIGHTS}"))}
        if found:
            return sorted(found, key=lambda folder: KINDS.index(found[folder]))
    raise AdapterError("this copy of minilora_hub ships no adapters: name the folders of your own")
