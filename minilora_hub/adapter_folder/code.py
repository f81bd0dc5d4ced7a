"""Hash the Python files of a repo, and compare the hash with those of the remote code of our releases.

Loading an adapter with `trust_remote_code` runs the `.py` files of its repo. Ours are the same in every repo of one
release, so a different hash means that they were changed. Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

REMOTE_CODE = Path(__file__).resolve().parents[1] / "remote_code"
REGISTRY = Path(__file__).with_name("released_code.json")
"""A JSON file, {version: hash of its remote code}; the hash of this version is computed."""


def remote_code_files() -> dict[str, Path]:
    """Return the files of this version's remote code, by their name in a repo."""
    return {path.name: path for path in sorted(REMOTE_CODE.glob("*.py")) if path.name != "__init__.py"}


def code_files(folder: Path) -> dict[str, Path]:
    """Return every Python file under a folder by its path in it: all code that loading could run."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}


def code_hash(files: dict[str, Path]) -> str:
    """Hash files by name and content.

    Args:
        files: ``{path in the repo: file}``.

    Returns:
        ``"sha256:<hex>"``, whatever the order of the files.
    """
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}:{hashlib.sha256(files[name].read_bytes()).hexdigest()}\n".encode())
    return f"sha256:{digest.hexdigest()}"


@cache
def remote_code_hash() -> str:
    """Return the hash of this version's remote code."""
    return code_hash(remote_code_files())


def release_of(digest: str) -> str | None:
    """Return the version of minilora_hub with this code hash, ``"this version"``, or None for unknown code."""
    if digest == remote_code_hash():
        return "this version"
    released: dict[str, str] = json.loads(REGISTRY.read_text(encoding="utf-8"))
    return next((version for version, known in released.items() if known == digest), None)
