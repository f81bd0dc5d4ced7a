"""Adapters that visitors can choose: the page's own, folders that its owner allows, public ones by id. No Gradio."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

from minilora_hub.adapter_folder.folders import inspect_source
from minilora_hub.compare.engine import Column, CompareEngine
from minilora_hub.demo.adapters.cards import AdapterCard, read_card
from minilora_hub.demo.adapters.from_hub import LinkedAdapters
from minilora_hub.demo.runs.comparison import UNKNOWN, Weights
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import require_plain_files

MOST_ADAPTERS = 5
"""Maximum number of adapters shown beside the base."""


class Catalogue:
    """The adapters of a page, with a card for each.

    Args:
        engine: the page's engine, whose columns are the page's own.
        links: downloads and caches adapters from the Hub. None: the page shows only its own.
        allowed: folders whose adapter folders visitors can choose by name. Visitors never pass a path: only adapters
            that are in these folders when the page starts can be chosen.

    Attributes:
        folders: {name: folder} of the allowed adapters.

    Raises:
        AdapterError: one of `allowed` is not a folder or holds no adapter, or two adapters have the same name.
    """

    def __init__(
        self, engine: CompareEngine, links: LinkedAdapters | None = None, allowed: Iterable[Path] = ()
    ) -> None:
        self.engine, self.links = engine, links
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
    def base(self) -> str:
        """The base's id on the Hub, or its name if it has none."""
        return (self.links and self.links.base_name) or self.engine.columns[0].name

    @property
    def names(self) -> list[str]:
        """The adapters that can be chosen without a download."""
        return [*(column.name for column in self.engine.columns[1:]), *self.folders]

    def paths(self) -> dict[str, Path]:
        """Return the folder of each of `names`."""
        known = {entry.name: entry.folder for entry in self.engine.bank.list()} | self.folders
        return {name: known[name] for name in self.names}

    def column(self, name: str) -> Column | None:
        """Return an adapter's column, if it is in memory."""
        own = next((column for column in self.engine.columns[1:] if column.name == name), None)
        return own or (self.links.get(name) if self.links else None)

    def card(self, name: str) -> AdapterCard:
        """Return an adapter's card.

        Raises:
            AdapterError: it is not on this page, or its folder is damaged.
        """
        if self.links and (linked := self.links.card(name)):
            return linked
        with self._lock:
            if name not in self._cards:
                folders = {entry.name: entry.folder for entry in self.engine.bank.list()} | self.folders
                if name not in folders:
                    raise AdapterError(f"{name[:60]!r}: there is no such adapter on this page")
                if name in self.folders:
                    require_plain_files(folders[name])
                self._cards[name] = read_card(name, folders[name])
            return self._cards[name]

    def weights(self, names: Iterable[str]) -> tuple[Weights, ...]:
        """Return the weights of the base and of each of `names`. The first call hashes the base, which may be slow."""
        found = [Weights(self.links.fingerprint if self.links else UNKNOWN)]
        for name in names:
            try:
                found.append(self.card(name).weights)
            except AdapterError:  # its folder was removed while it stayed in memory
                found.append(Weights())
        return tuple(found)


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
