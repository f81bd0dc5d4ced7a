"""A folder that is to be published: which adapter it holds, and whether it still is what its record says."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from minilora_hub.adapter_folder.hashes import Hashes
from minilora_hub.adapter_folder.results import VERIFICATION_FILE, Verification
from minilora_hub.errors import AdapterError

PEFT_FOLDER = "peft"
METHODS = {"mixlora": "MixLoRA", "dora": "DoRA", "lora": "LoRA"}


def recorded_before(folder: Path, hashes: Hashes) -> Verification | None:
    """Return the verification.json of a folder that was built before, None where there is none.

    Its hashes must be those of the folder's files, but for the code, which a build replaces: otherwise damaged weights
    would be recorded anew and published as good ones. The weights are hashed in the background: `require_recorded`
    looks at them later.

    Raises:
        AdapterError: a file is damaged, missing or was edited; the message says which, and what to do.
    """
    if not (folder / VERIFICATION_FILE).is_file():
        return None
    verification = Verification.load(folder)
    large = [path for path in verification.sha256 if path.endswith(".safetensors")]
    for path in large:
        if _lies_in(folder, path):
            hashes.start(folder / path)
    require_recorded(folder, verification, hashes, verification.sha256.keys() - set(large))
    return verification


def require_recorded(
    folder: Path, verification: Verification, hashes: Hashes, paths: Collection[str] | None = None
) -> None:
    """Refuse a folder whose files are not those that its verification.json recorded.

    Args:
        folder: the folder.
        verification: what was recorded.
        hashes: of its files.
        paths: only these files. Default: all that are recorded.

    Raises:
        AdapterError: see `recorded_before`.
    """
    for path in sorted(verification.sha256 if paths is None else paths):
        if path.endswith(".py"):
            continue
        if not _lies_in(folder, path):
            raise AdapterError(f"{VERIFICATION_FILE} lists {path}, which is not in {folder.name!r}: fetch it again")
        if hashes.of(folder / path) != verification.sha256[path]:
            raise AdapterError(
                f"{path} is not the file that {VERIFICATION_FILE} recorded: it is damaged, or was changed since. "
                f"If the change is meant, delete {VERIFICATION_FILE} and it is recorded anew"
            )


def _lies_in(folder: Path, path: str) -> bool:
    inside = folder.joinpath(path).resolve().is_relative_to(folder.resolve()) or folder.joinpath(path).is_symlink()
    return inside and (folder / path).is_file()
