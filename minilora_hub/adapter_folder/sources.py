"""A folder that is to be recorded, compared or published: an adapter in our own format, or LoRA or DoRA in PEFT's."""

from __future__ import annotations

from pathlib import Path

from minilora_hub.adapter_folder.code_references import require_no_other_code
from minilora_hub.adapter_folder.folders import ADAPTER_CONFIG as PEFT_CONFIG
from minilora_hub.adapter_folder.folders import OUR_CONFIG, Layout, describe_folder
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.tensor_files import SAFETENSORS as WEIGHTS
from minilora_hub.errors import AdapterError

__all__ = ["OUR_CONFIG", "PEFT_CONFIG", "WEIGHTS", "Layout", "Source", "inspect_source", "read_source"]


def read_source(folder: str | Path, name: str | None = None) -> Source:
    """Read which adapter a folder holds that is going to be loaded. Torch is not loaded.

    Args:
        folder: the adapter.
        name: what an error calls it. Default: the folder's name.

    Raises:
        AdapterError: the folder is missing, holds no adapter that can be published, or leads to code elsewhere; the
            message says what to do.
    """
    source = inspect_source(folder)
    require_no_other_code(source.folder, name)
    return source


def inspect_source(folder: str | Path) -> Source:
    """Read which adapter a folder holds, where nothing of it is going to be loaded: it may lead to code elsewhere.

    Raises:
        AdapterError: the folder is missing, or holds no adapter that can be published.
    """
    source = read_configuration(folder)
    if not (source.folder / WEIGHTS).is_file():
        raise AdapterError(
            f"adapter {source.folder.name!r}: no {WEIGHTS}; save it with save_pretrained, not as a pickle"
        )
    return source


def read_configuration(folder: str | Path) -> Source:
    """Read which adapter a folder describes; its weights may be missing, and it may lead to code elsewhere.

    Raises:
        AdapterError: the folder is missing, or describes no adapter that can be published.
    """
    source = describe_folder(folder)
    if source.dialect == "checkpoint":
        raise AdapterError(f"{source.folder.name!r} is a whole model ({source.method}), not an adapter")
    if source.dialect not in ("minilora", "peft"):
        raise AdapterError(
            f"adapter {source.folder.name!r} is a MixLoRA in the format {source.dialect!r}: convert it with "
            "`minilora import`"
        )
    return source
