"""Find the adapters of a comparison, and share one base among them."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from torch import nn

from minilora_hub.adapter_folder.folders import KINDS, adapter_facts, read_source
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.reading import fingerprint_trained_on
from minilora_hub.bases.embedded import HUB_ID as EMBEDDED_ID
from minilora_hub.bases.embedded import WEIGHTS_SHA256
from minilora_hub.bases.resolving import EMBEDDED, ResolvedBase, resolve_base
from minilora_hub.errors import AdapterError
from minilora_hub.hub.client import fetch
from minilora_hub.remote_code.adapter_files import UNKNOWN, base_fingerprint

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
    """A local adapter.

    Attributes:
        name: its display name.
        folder: its folder.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        base: the base it names.
        fingerprint: of the base it was trained on, or ``"unknown"``.
    """

    name: str
    folder: Path
    method: str
    base: str | None
    fingerprint: str

    @classmethod
    def read(cls, name: str, folder: Path, shown: str | None = None) -> FoundAdapter:
        """Read it from its folder; `shown` is what an error calls it."""
        source = read_source(folder, shown)
        return cls(name, folder, source.method, source.base, fingerprint_trained_on(source))


class NamesBase(Protocol):
    """An adapter as `common_base` needs it, such as a `FoundAdapter`."""

    @property
    def name(self) -> str: ...
    @property
    def base(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...


def find_adapter(name: str | Path) -> FoundAdapter:
    """Find an adapter by its folder or its Hub id, which is downloaded; none of its code runs.

    Raises:
        AdapterError: it does not exist, is of no known kind, or refers to code of another repo.
    """
    folder = Path(name)
    if folder.is_dir() or not HUB_ID.fullmatch(str(name)):
        return FoundAdapter.read(folder.resolve().name, folder)
    try:
        folder, _ = fetch(str(name), revision=None, token=None, progress=True)
    except AdapterError as error:
        raise AdapterError(f"adapter {str(name)!r}: there is no such folder, and on the Hub: {error}") from None
    return FoundAdapter.read(str(name).rpartition("/")[2], folder, str(name))


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


def common_base(base: str | Path | None, adapters: Sequence[NamesBase]) -> tuple[ResolvedBase, str]:
    """Find the base of all adapters; it is not loaded.

    Args:
        base: what the user names. None: the base that the adapters name.
        adapters: what it must fit.

    Returns:
        The base and the fingerprint of its weights.

    Raises:
        AdapterError: the adapters name different bases or none, or were trained on another one.
        BaseModelError: it cannot be found.
        ValueError: there is neither a base nor an adapter.
    """
    if base is None:
        named = sorted({adapter.base or "" for adapter in adapters})
        if not named:
            raise ValueError("base=None: must be given where no adapter names one")
        if len(named) > 1 or not named[0]:
            shown = ", ".join(f"{adapter.name}: {adapter.base!r}" for adapter in adapters)
            raise AdapterError(f"the adapters do not name one base ({shown}): pass base= (--base)")
        base = named[0]
        # The embedded base goes by the name of the model it is a rounding of; its fingerprint tells it apart.
        embedded = "sha256:" + hashlib.sha256(f"model.safetensors:{WEIGHTS_SHA256}\n".encode()).hexdigest()
        if base == EMBEDDED_ID and all(adapter.fingerprint == embedded for adapter in adapters):
            base = EMBEDDED
    resolved = resolve_base(base)
    fingerprint = base_fingerprint(str(resolved.path))
    for adapter in adapters:
        if UNKNOWN not in (fingerprint, adapter.fingerprint) and fingerprint != adapter.fingerprint:
            raise AdapterError(
                f"adapter {adapter.name!r} was trained on another base: on {adapter.base!r} with fingerprint "
                f"{adapter.fingerprint[:19]}…, and base {resolved.name!r} has {fingerprint[:19]}…: pass its own, "
                "base= (--base)"
            )
    return resolved, fingerprint


def base_for(base: str | None, adapters: Sequence[str | Path], progress: Callable[[str], None]) -> str:
    """Return the name of the base to run these adapters on: `base` if one is given, else the one that they name.

    A given one may be another than they were trained on, such as a copy of it in a folder: `progress` is told then.

    Raises:
        AdapterError, BaseModelError, ValueError: see `common_base`.
    """
    found = find_adapters(adapters)
    if base is None:
        return common_base(None, found)[0].name
    resolved = resolve_base(base)
    for adapter in found:
        if adapter.base in (None, base, resolved.name, resolved.hub_id):
            continue
        if not (Path(adapter.base).is_dir() and resolved.path.samefile(adapter.base)):
            progress(f"note: {adapter.name} names the base {adapter.base!r}, and runs on {base!r} here")
    return base


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
