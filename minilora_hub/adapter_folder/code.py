"""Hash the code of a repo, and compare the hash with those of the code of our releases.

Loading an adapter with `trust_remote_code` runs the `.py` files of its repo, and an Inference Endpoint installs its
`requirements.txt` and runs its `handler.py`. Ours are the same in every repo of one release, so a different hash means
that they were changed. Nothing here loads torch.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

REMOTE_CODE = Path(__file__).resolve().parents[1] / "remote_code"
ENDPOINT = Path(__file__).resolve().parent / "endpoint"
HANDLER, REQUIREMENTS = "handler.py", "requirements.txt"
REGISTRY = Path(__file__).with_name("released_code.json")
"""A JSON file, {version: hashes of its code}; the hashes of this version are computed."""


def remote_code_files() -> dict[str, Path]:
    """Return the files of this version's remote code, by their name in a repo."""
    return {path.name: path for path in sorted(REMOTE_CODE.glob("*.py")) if path.name != "__init__.py"}


def endpoint_files(peft_layout: bool) -> dict[str, Path]:
    """Return the files that make a repo an Inference Endpoint, by their name in a repo.

    Args:
        peft_layout: whether the repo is in PEFT's layout, which needs PEFT.
    """
    requirements = "requirements-peft.txt" if peft_layout else REQUIREMENTS
    return {HANDLER: ENDPOINT / HANDLER, REQUIREMENTS: ENDPOINT / requirements}


def code_files(folder: Path) -> dict[str, Path]:
    """Return every file under a folder that is or installs code, by its path in it: Python files, requirements.txt."""
    found = [*folder.rglob("*.py"), *folder.glob(REQUIREMENTS)]
    return {path.relative_to(folder).as_posix(): path for path in sorted(found)}


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


@cache
def published_code_hashes() -> tuple[str, ...]:
    """Return the hash of each set of code files that this version publishes.

    The remote code; the same with the files of an endpoint; in PEFT's layout, the files of an endpoint alone.
    """
    ours = remote_code_files()
    return remote_code_hash(), code_hash(ours | endpoint_files(False)), code_hash(endpoint_files(True))


def release_of(digest: str) -> str | None:
    """Return the version of minilora_hub with this code hash, ``"this version"``, or None for unknown code."""
    if digest in published_code_hashes():
        return "this version"
    released: dict[str, list[str]] = json.loads(REGISTRY.read_text(encoding="utf-8"))
    return next((version for version, known in released.items() if digest in known), None)


if __name__ == "__main__":
    print(json.dumps(published_code_hashes(), indent=2))
