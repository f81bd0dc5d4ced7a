"""Where things are kept that outlive a command: the user's folders for caches and for data, on each system."""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "minilora_hub"


def cache_root() -> Path:
    """Return minilora_hub's cache: ``$MINILORA_CACHE``, or ``minilora_hub`` in ``$XDG_CACHE_HOME`` or the system's."""
    return _folder("MINILORA_CACHE", "XDG_CACHE_HOME", windows="Cache", mac="Caches", other=".cache")


def data_folder() -> Path:
    """Return where pages keep their data: ``$MINILORA_DATA``, or ``minilora_hub`` in the user's folder for data."""
    return _folder("MINILORA_DATA", "XDG_DATA_HOME", windows="Data", mac="Application Support", other=".local/share")


def _folder(variable: str, shared_variable: str, *, windows: str, mac: str, other: str) -> Path:
    if chosen := os.environ.get(variable):
        return Path(chosen).expanduser()
    if os.path.isabs(shared := os.environ.get(shared_variable, "")):
        return Path(shared) / NAME
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / NAME / windows
    if sys.platform == "darwin":
        return Path.home() / "Library" / mac / NAME
    return Path.home() / other / NAME
