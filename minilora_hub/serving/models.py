"""The models of a server: the base and its adapters, by the names under which a client may ask for them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from minilora_hub.adapter_folder.folders import Kind, inspect_source
from minilora_hub.compare.engine import CompareEngine
from minilora_hub.compare.found_adapters import find_adapter
from minilora_hub.compare.prompt_index import AdapterIndex, Choice, choose_in
from minilora_hub.errors import AdapterError, ServingError
from minilora_hub.serving.steps import UNUSABLE

AUTO: Final = "auto"
"""The model that stands for the adapter which an index chooses by the prompt."""

NAME = re.compile(r"[\w.][\w./-]{0,199}")


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can ask for.

    Attributes:
        name: its name in answers.
        kind: its method, ``"base"`` or ``"auto"``.
        parent: the base's name; None for the base.
        detail: its size in a few words.
        loaded: whether its tensors are in memory.
    """

    name: str
    kind: Kind | Literal["auto"]
    parent: str | None
    detail: str
    loaded: bool


class Models:
    """The base of an engine and the adapters of its bank.

    Args:
        engine: the models.
        adapters: the adapters as they were named on the command line; the engine's columns, in the same order.
        base_names: further names of the base.
    """

    def __init__(
        self,
        engine: CompareEngine,
        adapters: Sequence[str | Path] = (),
        base_names: Iterable[str] = (),
    ) -> None:
        self._engine = engine
        self.base = engine.columns[0].name
        self._base_names = {self.base, *base_names}
        self._aliases: dict[str, str] = {}
        for given, column in zip(adapters, engine.columns[1:], strict=True):
            self._add_aliases(column.name, str(given))
        self._changing = asyncio.Lock()
        self._index: AdapterIndex | None = None

    def choose_with(self, index: AdapterIndex) -> None:
        """Let the model `AUTO` be the adapter that an index chooses.

        Raises:
            AdapterError: another model has this name, or an adapter of the index is not served.
        """
        if AUTO in self._base_names or self._engine.bank.find(AUTO) is not None:
            raise AdapterError(f"index: a model is called {AUTO!r}: rename its folder")
        missing = sorted(one.name for one in index.adapters if self._engine.bank.find(one.name) is None)
        if missing:
            raise AdapterError(f"index: its adapters {', '.join(missing)} are not served: name their folders")
        self._index = index

    async def choose(self, text: str) -> Choice:
        """Choose an adapter by the prompt, with the base.

        Raises:
            ServingError: the prompt has no token, or none of the index's adapters is left (400).
        """
        assert self._index is not None
        served = [entry.name for entry in self._engine.bank.list()]
        try:
            return await asyncio.to_thread(choose_in, self._engine, self._index, text, served)
        except UNUSABLE as error:
            raise ServingError(400, f"model={AUTO!r}: {error}", "model") from None

    def is_auto(self, name: str) -> bool:
        """Return whether an index chooses the adapter for this name."""
        return self._index is not None and name == AUTO

    def adapter(self, name: str) -> str | None:
        """Return the name in the bank of the model that a client asks for; None for the base.

        Args:
            name: the base's name, an adapter's, ``base:adapter``, or the folder or repo from which it was loaded.

        Raises:
            ServingError: there is no such model (404).
        """
        if name in self._base_names or self.is_auto(name):
            return None
        names = [name]
        names += [name.removeprefix(f"{base}:") for base in self._base_names if name.startswith(f"{base}:")]
        for asked in names:
            found = self._aliases.get(asked, asked)
            if self._engine.bank.find(found) is not None:
                return found
        raise ServingError(
            404, f"model={name[:200]!r}: there is no such model; GET /v1/models lists them", "model", "model_not_found"
        )

    def all(self) -> list[ServedModel]:
        """Return the base, and every adapter."""
        base = self._engine.columns[0]
        found = [ServedModel(base.name, "base", None, base.detail, True)]
        for entry in self._engine.bank.list():
            found.append(ServedModel(entry.name, entry.facts.kind, self.base, entry.facts.detail, entry.loaded))
        if self._index is not None:
            found.append(ServedModel(AUTO, AUTO, self.base, f"one of {len(self._index.adapters)} by the prompt", True))
        return found

    def register_folder(self, folder: Path) -> tuple[int, list[str]]:
        """Register every adapter of a folder of folders; their tensors are read when they are asked for.

        Returns:
            How many were registered, and why others were not.

        Raises:
            AdapterError: there is no such folder.
            ValueError: an adapter has the name of another model.
        """
        require_folder(folder)
        count, refused = 0, []
        for path in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            try:
                inspect_source(path)
                self._require_new(path.name)
                self._engine.bank.register(path.name, path)
            except AdapterError as error:
                refused.append(f"{path.name}: not served: {error}")
            else:
                count += 1
                self._add_aliases(path.name, str(path))
        return count, refused

    async def prepare(self, adapter: str | None) -> None:
        """Read an adapter that is not in memory, so that a damaged one is refused before an answer begins.

        Raises:
            ServingError: it is damaged, or does not fit the base (400).
        """
        entry = None if adapter is None else self._engine.bank.find(adapter)
        if entry is None:
            return
        try:
            await asyncio.to_thread(self._engine.prompting, adapter)
            if not entry.loaded:
                await asyncio.to_thread(self._read, entry.name)
        except UNUSABLE as error:
            raise unusable(adapter, error) from None

    def _read(self, adapter: str) -> None:
        with self._engine.exclusive():
            self._engine.bank.load(adapter)

    async def load(self, name: str, source: str) -> None:
        """Load an adapter from a folder of this machine, or a repo on the Hub, which is downloaded.

        Raises:
            ServingError: the name is taken or not allowed, or the adapter cannot be used (400).
        """
        if not NAME.fullmatch(name):
            raise ServingError(400, f"lora_name={name[:200]!r}: must be letters, digits, _ . / -", "lora_name")
        async with self._changing:
            self._require_new(name, status=True)
            try:
                found = await asyncio.to_thread(find_adapter, source)
                await asyncio.to_thread(self._engine.load, name, found.folder)
            except UNUSABLE as error:
                raise unusable(name, error) from None
            self._add_aliases(name, source)

    async def unload(self, name: str) -> None:
        """Remove an adapter.

        Raises:
            ServingError: there is none of this name (404), or rows are using it (409).
        """
        async with self._changing:
            adapter = self.adapter(name)
            if adapter is None:
                raise ServingError(400, f"lora_name={name!r}: the base cannot be unloaded", "lora_name")
            try:
                await asyncio.to_thread(self._engine.unload, adapter)
            except ValueError as error:
                raise ServingError(409, f"lora_name={name!r}: {error}", "lora_name", "in_use") from None
            self._aliases = {alias: target for alias, target in self._aliases.items() if target != adapter}

    def _require_new(self, name: str, status: bool = False) -> None:
        taken = (
            self.is_auto(name)
            or name in self._base_names
            or name in self._aliases
            or self._engine.bank.find(name) is not None
        )
        if taken and status:
            raise ServingError(400, f"lora_name={name!r}: a model of this name is loaded", "lora_name", "name_taken")
        if taken:
            raise ValueError(f"adapter {name!r}: there is already a model of this name: rename the folder")

    def _add_aliases(self, name: str, source: str) -> None:
        folder = Path(source)
        for alias in {source, source.rstrip("/"), *([str(folder.resolve())] if folder.is_dir() else [])}:
            self._aliases.setdefault(alias, name)


def require_folder(folder: Path) -> None:
    """Raise AdapterError unless there is such a folder."""
    if not folder.is_dir():
        raise AdapterError(f"{str(folder)!r}: there is no such folder")


def unusable(adapter: str | None, error: Exception) -> ServingError:
    """Return the error for an adapter that cannot be used."""
    return ServingError(400, f"adapter {adapter!r} cannot be used: {error}", "model", "adapter_unusable")
