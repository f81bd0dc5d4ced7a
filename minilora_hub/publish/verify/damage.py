"""Damage a copy of an adapter's weights in a few bytes, to check that strict loading refuses it.

The weights are never read into memory, because they may be large, and one copy is used for every kind of damage. Torch
is not needed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import ascii_letters
from typing import Any

from minilora_hub.adapter_folder.names import OUR_CONFIG, WEIGHTS
from minilora_hub.errors import AdapterError
from minilora_hub.formats.checkpoint import require_space
from minilora_hub.hub.plain_files import read_header

NOT_FINITE = b"\xff" * 8  # all ones is NaN in every floating-point format, the widest of which has 8 bytes
Damage = tuple[int, bytes]
"""The position in the file, and the bytes to write there. The file keeps its size."""


def damages(weights: Path) -> dict[str, Damage]:
    """Return the kinds of damage: one renames a tensor that the configuration needs, one makes a value NaN.

    Raises:
        AdapterError: it is not a safetensors file, or holds no values.
    """
    header, start = read_header(weights)
    names = sorted(name for name, entry in header.items() if name != "__metadata__" and 0 not in entry["shape"])
    if not names:
        raise AdapterError(f"{weights.name} holds no tensor")
    begin, end = header[names[0]]["data_offsets"]
    return {
        "a missing tensor": _rename(weights, header, start, names[0]),
        "a NaN": (start + begin, NOT_FINITE[: end - begin]),
    }


def copy_for_damage(folder: Path, scratch: Path) -> Path:
    """Copy the weights and the configuration of `folder` into `scratch`, and return the copy of the weights.

    Raises:
        AdapterError: the disk has not enough space.
    """
    require_space(scratch, (folder / WEIGHTS).stat().st_size)
    for name in (WEIGHTS, OUR_CONFIG):
        shutil.copyfile(folder / name, scratch / name)
    return scratch / WEIGHTS


def _rename(weights: Path, header: dict[str, Any], start: int, name: str) -> Damage:
    """Give a tensor another name of the same length, so that everything after the header stays in its place."""
    other = next((new for last in ascii_letters if (new := name[:-1] + last) not in header), name)
    renamed = {other if key == name else key: entry for key, entry in header.items()}
    text = json.dumps(renamed, separators=(",", ":"), ensure_ascii=False)
    with weights.open("rb") as file:
        file.seek(8)
        before = file.read(start - 8)
    after = text.encode().ljust(len(before))
    if other == name or len(after) > len(before):
        raise AdapterError(f"{weights.name}: its header is not written as the safetensors library writes it")
    first = next(i for i, (one, two) in enumerate(zip(before, after, strict=True)) if one != two)
    behind = next(i for i, (one, two) in enumerate(zip(reversed(before), reversed(after), strict=True)) if one != two)
    return 8 + first, after[first : len(after) - behind]
