"""Hash files, and compare a published folder with the hashes in its verification.json."""

from __future__ import annotations

import hashlib
from pathlib import Path

from minilora_hub.adapter_folder.code import REQUIREMENTS
from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, Verification
from minilora_hub.errors import AdapterError


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_before(folder: Path) -> Verification | None:
    """Return the verification.json of a folder that was built before, None where there is none.

    Its hashes must be those of the folder's files, except for the code, which a build replaces: otherwise damaged
    weights would be recorded again and published as good ones.

    Raises:
        AdapterError: a file is damaged, missing or was edited; the message says which, and what to do.
    """
    if not (folder / VERIFICATION_FILE).is_file():
        return None
    verification = Verification.load(folder)
    for path, digest in sorted(verification.sha256.items()):
        if path.endswith(".py") or path == REQUIREMENTS:
            continue
        if not _is_inside(folder, path):
            raise AdapterError(f"{VERIFICATION_FILE} lists {path}, which is not in {folder.name!r}: fetch it again")
        if file_sha256(folder / path) != digest:
            raise AdapterError(
                f"{path} is not the file that {VERIFICATION_FILE} recorded: it is damaged, or was changed since. "
                f"If the change is meant, delete {VERIFICATION_FILE} and the push records again"
            )
    return verification


def _is_inside(folder: Path, path: str) -> bool:
    inside = folder.joinpath(path).resolve().is_relative_to(folder.resolve()) or folder.joinpath(path).is_symlink()
    return inside and (folder / path).is_file()
