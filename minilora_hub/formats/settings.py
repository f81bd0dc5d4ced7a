"""Fields of a configuration file from elsewhere, each read with its type."""

from __future__ import annotations

from typing import Any

from minilora_hub.adapter_folder.names import PEFT_CONFIG
from minilora_hub.errors import AdapterError


class Settings:
    """The fields of a configuration from outside, each read with its type; what was not asked for can be told.

    Args:
        content: the fields.
        file: the name that errors say.
    """

    def __init__(self, content: dict[str, Any], file: str = PEFT_CONFIG) -> None:
        self.content, self.file, self.asked = content, file, set[str]()

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field; `default` where it is missing or null.

        Raises:
            AdapterError: it is of another type.
        """
        self.asked.add(name)
        value = self.content.get(name)
        if value is None:
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise self.error(name, f"must be of type {' or '.join(kind.__name__ for kind in allowed)}")
        return value

    def require(self, name: str, kinds: type | tuple[type, ...]) -> Any:
        """Return a field that must be there.

        Raises:
            AdapterError: it is missing or of another type.
        """
        value = self.get(name, kinds)
        if value is None:
            raise AdapterError(f"{self.file}: {name} is missing")
        return value

    def error(self, name: str, need: str) -> AdapterError:
        """Build the error about a field: file, name, value received, what is required."""
        shown = repr(self.content.get(name))
        return AdapterError(f"{self.file}: {name}={shown[:120]}: {need}")
