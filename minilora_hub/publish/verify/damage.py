"""What is changed in an adapter's weights to see that strict loading refuses them: a few bytes of one copy, in turns.

The weights may be as large as a disk allows, so they are never in memory here, and there is one copy of them, not one
for each kind of damage. Torch is not needed.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from string import ascii_letters
from typing import Any

from minilora_hub.adapter_folder.names import OUR_CONFIG, WEIGHTS
from minilora_hub.errors import AdapterError
from minilora_hub.formats.checkpoint import require_space
from minilora_hub.hub.plain_files import read_header

POISON = b"\xff" * 8  # all ones is no number in every floating-point format, the widest of which has 8 bytes


@dataclass(frozen=True)
class Damage:
    """Bytes to be written into the weights, which keep their size.

    Attributes:
        offset: where in the file.
        content: what is written there.
    """

    offset: int
    content: bytes


def damages(weights: Path) -> dict[str, Damage]:
    """Return what to damage: ``{what is wrong then: damage}``.

    One takes a tensor away that the configuration asks for, and leaves one of another name in its place; one makes a
    value that is no number.

    Raises:
        AdapterError: it is no safetensors file with values in it.
    """
    header, start = read_header(weights)
    names = sorted(name for name, entry in header.items() if name != "__metadata__" and 0 not in entry["shape"])
    if not names:
        raise AdapterError(f"{weights.name} holds no tensor")
    begin, end = header[names[0]]["data_offsets"]
    return {
        "a missing tensor": _renamed(weights, header, start, names[0]),
        "a value that is no number": Damage(start + begin, POISON[: end - begin]),
    }


def copy_for_damage(folder: Path, scratch: Path) -> Path:
    """Copy the weights and the configuration of `folder` into `scratch`, for the damages to be made there.

    Raises:
        AdapterError: the disk has no room for it.
    """
    require_space(scratch, (folder / WEIGHTS).stat().st_size)
    for name in (WEIGHTS, OUR_CONFIG):
        shutil.copyfile(folder / name, scratch / name)
    return scratch / WEIGHTS


def _renamed(weights: Path, header: dict[str, Any], start: int, name: str) -> Damage:
    """Give a tensor another name of the same length, so that everything behind the header stays where it is."""
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
    return Damage(8 + first, after[first : len(after) - behind])
