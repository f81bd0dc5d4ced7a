"""The adapters that visitors can choose: the page's own, folders its owner allows, and public ones by id. No Gradio."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from minilora_hub.adapter_folder.folders import inspect_source
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.demo.adapters.cards import AdapterCard, read_card
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.comparison import UNKNOWN, Weights
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import require_plain_files

CHOSEN = 5
"""The most adapters beside the base."""


class Catalogue:
    """What there is to choose from, with a card for each.

    Args:
        engine: the page's engine, whose columns are the page's own.
        links: what fetches and keeps the others; None: there are no others.
        allowed: folders in which each folder that holds an adapter can be chosen, by its name. A visitor never names a
            path: only what stands in this list when the page starts.

    Raises:
        AdapterError: one of `allowed` is no folder, holds no adapter, or two adapters have the same name.
    """

    def __init__(
        self, engine: CompareEngine, links: LinkedAdapters | None = None, allowed: Iterable[Path] = ()
    ) -> None:
        """Look through the folders; nothing is loaded."""
        self._engine, self._links = engine, links
        self._cards: dict[str, AdapterCard] = {}
        self._lock = threading.Lock()
        own = {column.name for column in engine.columns}
        self.folders: dict[str, Path] = {}
        for folder in allowed:
            for name, path in _adapters_in(Path(folder)).items():
                if name in own or name in self.folders:
                    raise AdapterError(f"{str(folder)!r}: there is already an adapter called {name!r}: rename one")
                self.folders[name] = path

    @property
    def names(self) -> list[str]:
        """The adapters that can be chosen without fetching anything."""
        return [*(column.name for column in self._engine.columns[1:]), *self.folders]

    def card(self, name: str) -> AdapterCard:
        """Return what is known of an adapter that is here.

        Raises:
            AdapterError: it is not, or its folder is damaged.
        """
        if self._links and (linked := self._links.cards.get(name)):
            return linked
        with self._lock:
            if name not in self._cards:
                folder = self._folder(name)
                if name in self.folders:
                    require_plain_files(folder)
                self._cards[name] = read_card(name, folder)
            return self._cards[name]

    def weights(self, names: Iterable[str]) -> tuple[Weights, ...]:
        """Return which weights the base and then each of `names` are. Hashing a large base takes a moment, once."""
        base = Weights(self._links.fingerprint if self._links else UNKNOWN)
        return base, *(self._weights_of(name) for name in names)

    def _weights_of(self, name: str) -> Weights:
        try:
            return self.card(name).weights
        except AdapterError:  # its folder went away while it stayed in memory
            return Weights()

    @property
    def base(self) -> str:
        """What the base is called: its id on the Hub where it has one."""
        return (self._links and self._links.base_name) or self._engine.columns[0].name

    def _folder(self, name: str) -> Path:
        if name in self.folders:
            return self.folders[name]
        for entry in self._engine.bank.list():
            if entry.name == name:
                return entry.folder
        raise AdapterError(f"{name[:60]!r}: there is no such adapter on this page")


def _adapters_in(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise AdapterError(f"{str(folder)!r}: no such folder")
    found = {}
    for path in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        try:
            inspect_source(path)
        except AdapterError:
            continue
        found[path.name] = path
    if not found:
        raise AdapterError(f"{str(folder)!r}: none of the folders in it holds an adapter")
    return found
