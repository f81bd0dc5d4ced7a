"""Hash a base's large files once, and again when they may have changed.

An adapter names its base by a hash of the checkpoint files, and every load compares it. The hash of a large file is
kept in the assets folder of the Hub's cache, with everything by which the file system shows a change: size, inode, and
the times of the last write and of the last change of the inode, which no program can set.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

LARGE = 2**22
"""Bytes from which a hash is kept; smaller files are hashed faster than the cache is read."""

SETTLED = 2 * 10**9
"""Nanoseconds since the last change before a hash is kept: clocks of file systems do not tell closer changes apart."""


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    path = os.path.realpath(path)
    state = _state(path)
    if state["size"] < LARGE or os.name == "nt":  # where Windows has no time of change
        return _hash(path)
    kept = _kept_file(path)
    if kept is not None:
        known = _read(kept)
        digest = known.pop("sha256", None)
        if known == state and isinstance(digest, str):
            return digest
    settled = time.time_ns() - max(state["written"], state["changed"]) > SETTLED
    digest = _hash(path)
    if kept is not None and settled and _state(path) == state:
        _write(kept, {**state, "sha256": digest})
    return digest


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _state(path: str) -> dict[str, Any]:
    stat = os.stat(path)
    return {
        "path": path, "size": stat.st_size, "device": stat.st_dev, "inode": stat.st_ino,
        "written": stat.st_mtime_ns, "changed": stat.st_ctime_ns,
    }  # fmt: skip


def _kept_file(path: str) -> Path | None:
    """Return the file that keeps the hash of `path`; None where the cache cannot be written."""
    try:
        folder = cached_assets_path("minilora", "sha256")
    except (OSError, ValueError):
        return None
    return folder / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _read(kept: Path) -> dict[str, Any]:
    try:
        content = json.loads(kept.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(kept: Path, content: dict[str, Any]) -> None:
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, kept)
    except OSError:  # a full disk: the next load hashes again
        temporary.unlink(missing_ok=True)
