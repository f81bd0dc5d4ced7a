"""Copies of an adapter with one thing wrong, which strict loading must refuse. Torch is not needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from minilora_hub.errors import AdapterError
from minilora_hub.recording.sources import OUR_CONFIG, WEIGHTS


def read_header(data: bytes) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file, and where its tensors start.

    Raises:
        AdapterError: it is no safetensors file.
    """
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError as error:
        raise AdapterError(f"{WEIGHTS} is not a readable safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise AdapterError(f"{WEIGHTS} is not a readable safetensors file: its header is no object")
    return header, 8 + length


def damaged_copies(folder: Path) -> dict[str, bytes]:
    """Return damaged weights: ``{what is wrong: content}``.

    One lacks a tensor that its configuration asks for, and has one of another name; one holds a value that
    is no number.

    Raises:
        AdapterError: the folder's own weights are no safetensors file with a tensor in it.
    """
    data = (folder / WEIGHTS).read_bytes()
    header, start = read_header(data)
    names = sorted(name for name in header if name != "__metadata__")
    if not names:
        raise AdapterError(f"{WEIGHTS} holds no tensor")
    first = names[0]
    renamed = {f"{name}_x" if name == first else name: entry for name, entry in header.items()}
    text = json.dumps(renamed).encode()
    begin, end = (start + offset for offset in header[first]["data_offsets"])
    poison = b"\xff" * min(4, end - begin)  # all ones is no number in every floating-point format
    return {
        "a missing tensor": len(text).to_bytes(8, "little") + text + data[start:],
        "a value that is no number": data[:begin] + poison + data[begin + len(poison) :],
    }


def write_copies(weights: dict[str, bytes], folder: Path, scratch: Path) -> dict[str, Path]:
    """Write each of the damaged weights into a folder of its own, beside the configuration of `folder`."""
    copies = {}
    for count, (name, content) in enumerate(weights.items()):
        copies[name] = scratch / str(count)
        copies[name].mkdir()
        (copies[name] / WEIGHTS).write_bytes(content)
        if (folder / OUR_CONFIG).is_file():
            shutil.copyfile(folder / OUR_CONFIG, copies[name] / OUR_CONFIG)
    return copies
