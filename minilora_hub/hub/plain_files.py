"""Check an untrusted folder for links, special files and false sizes before it is read. Torch is not needed.

It may hold a link to a file elsewhere on this machine, a pipe that never ends, a file of a few bytes that claims a
terabyte, tensors that lie beyond the end of their file, or an index that names files in other folders.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError

SMALL, SPARSE = 2**20, 10
"""A file of at least SMALL bytes is sparse where less than a tenth is on the disk; compression saves less."""
INDEX = "*.safetensors.index.json"


def shown_name(folder: Path) -> str:
    """Return a folder's name, or the repo's id where it is a snapshot in the Hub's cache."""
    repo, between = folder.parent.parent.name, folder.parent.name
    cached = between == "snapshots" and repo.startswith("models--")
    return repo.removeprefix("models--").replace("--", "/") if cached else folder.name


def require_plain_files(folder: Path) -> None:
    """Refuse a folder with links that leave it, or with special or sparse files.

    A snapshot in the Hub's cache consists of links into the cache's own `blobs`, which are allowed.

    Args:
        folder: the folder; every path below it is checked, and no file is read.

    Raises:
        AdapterError: there is one; the message names it and says what to do.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for place, folders, names in os.walk(root):
        for name in sorted([*folders, *names]):
            path = Path(place, name)
            shown = f"adapter {shown_name(folder)!r}: {path.relative_to(root).as_posix()}"
            if path.is_symlink() and not _stays_in(path, inside):
                raise AdapterError(f"{shown} is a symbolic link out of the folder: put the file itself there")
            status = path.stat()
            if stat.S_ISDIR(status.st_mode):
                continue
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(f"{shown} is not a regular file: remove it")
            if _is_sparse(path, status):
                raise AdapterError(
                    f"{shown} says that it has {status.st_size:,} bytes, and nearly all of them are holes: "
                    "download it again"
                )


def require_true_sizes(folder: Path) -> None:
    """Refuse a folder with weights whose header does not match their size, or an index of files elsewhere.

    Raises:
        AdapterError: there is one; the message names it.
    """
    for path in sorted(folder.rglob("*.safetensors")):
        read_header(path)
    require_plain_indexes(folder)


def require_plain_names(names: Iterable[str], repo: str) -> None:
    """Refuse a repo on the Hub that lists files outside its own folder.

    Raises:
        AdapterError: one of the names is absolute or leads upwards.
    """
    for name in names:
        if not _is_plain(name):
            raise AdapterError(f"{repo} lists a file called {name[:100]!r}, which is not a path inside a repo")


def require_plain_indexes(folder: Path) -> None:
    """Refuse a folder with an index of a sharded checkpoint that names files elsewhere.

    Raises:
        AdapterError: it does, or is not an index.
    """
    for path in sorted(folder.glob(INDEX)):
        try:
            shards = set(strict_json(path.read_bytes())["weight_map"].values())
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise AdapterError(
                f"{path.name} is not an index of a checkpoint ({type(error).__name__}: {error})"
            ) from error
        for shard in shards:
            if not isinstance(shard, str) or not _is_plain(shard):
                shown = str(shard)[:100]
                raise AdapterError(f"{path.name}: weight_map names {shown!r}, which is not a path inside the folder")


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, whose tensors must fill exactly the rest of the file.

    Returns:
        ``{name: {"dtype", "shape", "data_offsets"}}``, with ``__metadata__`` where there is any, and the position at
        which the tensors start.

    Raises:
        AdapterError: it is not a safetensors file, its header does not match its size, or it names a tensor twice.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # compares lengths, offsets, shapes and dtypes with the file's size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = strict_json(file.read(length))  # safetensors takes the last of two tensors of one name
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{path.name} is not a readable safetensors file: {error}") from error
    return header, 8 + length


def _stays_in(link: Path, folders: Iterable[Path]) -> bool:
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # a broken or circular link
        return False
    return any(target.is_relative_to(folder) for folder in folders)


def _is_sparse(path: Path, status: os.stat_result) -> bool:
    blocks = getattr(status, "st_blocks", None)  # Windows has none
    if blocks is None or status.st_size < SMALL or blocks * 512 * SPARSE >= status.st_size:
        return False
    with path.open("rb") as file:  # some network file systems count no blocks, and report no holes either
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < status.st_size


def _is_plain(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    return not (".." in parts or "" in parts or re.match("[A-Za-z]:", name) or "\0" in name)
