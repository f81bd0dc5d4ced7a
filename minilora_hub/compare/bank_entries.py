"""What a bank knows of its adapters beside their tensors: names, files, sizes."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minilora_hub.adapter_folder.folders import AdapterFacts


@dataclass(frozen=True)
class BankEntry:
    """One registered adapter.

    Attributes:
        name: its name in rows.
        folder: the folder of its files.
        facts: its kind and size, from its configuration.
        bytes: size of its tensors in memory; 0 while it is not loaded.
        version: of the files that were last loaded; it is another one after they have changed. None before that.
    """

    name: str
    folder: Path
    facts: AdapterFacts
    bytes: int = 0
    version: Hashable | None = None

    @property
    def loaded(self) -> bool:
        """Whether its tensors are in memory."""
        return self.bytes > 0


@dataclass(frozen=True)
class BankMemory:
    """Bytes of the tensors of the base and of all loaded adapters, and the pool's limit (None: unlimited)."""

    base: int
    adapters: int
    limit: int | None


def version_of(folder: Path) -> Hashable:
    """Return what is equal as long as a folder's files stay as they are."""
    files = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return str(folder), *((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files)


def tensor_bytes(model: nn.Module) -> int:
    """Count the bytes of a model's tensors; memory that they share counts once."""
    storages = {}
    for one in (*model.parameters(), *model.buffers()):
        # A quantizer may have made a weight a class of its own, which consists of several tensors (torchao).
        parts = (
            [getattr(one, name) for name in one.__tensor_flatten__()[0]]
            if hasattr(one, "__tensor_flatten__")
            else [one]
        )
        for tensor in parts:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
