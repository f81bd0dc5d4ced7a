"""A folder that is to be recorded, compared or published: an adapter in our own format, or LoRA or DoRA in PEFT's."""

from __future__ import annotations

from pathlib import Path

from minilora_hub.adapter_folder.folders import ADAPTER_CONFIG as PEFT_CONFIG
from minilora_hub.adapter_folder.folders import OUR_CONFIG, Layout, read_folder
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.tensor_files import SAFETENSORS as WEIGHTS
from minilora_hub.errors import AdapterError

__all__ = ["OUR_CONFIG", "PEFT_CONFIG", "WEIGHTS", "Layout", "Source", "read_source"]


def read_source(folder: str | Path) -> Source:
    """Read which adapter a folder holds. Nothing of it is run, and torch is not loaded.

    Raises:
        AdapterError: the folder is missing, or holds no adapter that can be published; the message says what to do.
    """
    source = read_configuration(folder)
    if not (source.folder / WEIGHTS).is_file():
        raise AdapterError(
            f"adapter {source.folder.name!r}: no {WEIGHTS}; save it with save_pretrained, not as a pickle"
        )
    return source


def read_configuration(folder: str | Path) -> Source:
    """Read which adapter a folder describes, whose weights need not be there yet.

    Raises:
        AdapterError: the folder is missing, or describes no adapter that can be published.
    """
    source = read_folder(folder)
    if source.dialect == "checkpoint":
        raise AdapterError(f"{source.folder.name!r} is a whole model ({source.method}), not an adapter")
    if source.dialect not in ("minilora", "peft"):
        raise AdapterError(
            f"adapter {source.folder.name!r} is a MixLoRA in the format {source.dialect!r}: convert it with "
            "`minilora import`"
        )
    return source
