"""What lies in a folder that is to be published: its kind, its settings, and which of its files travel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.errors import AdapterError
from minilora_hub.formats.folders import COMPANIONS as COMPANIONS
from minilora_hub.formats.folders import TOKENIZER_FILES as TOKENIZER_FILES
from minilora_hub.formats.folders import read_json as read_json
from minilora_hub.publish.hashes import Hashes
from minilora_hub.results import VERIFICATION_FILE, Verification

Layout = Literal["auto", "peft"]

WEIGHTS = "adapter_model.safetensors"
OUR_CONFIG, PEFT_CONFIG = "config.json", "adapter_config.json"
PEFT_FOLDER = "peft"
METHODS = {"mixlora": "MixLoRA", "dora": "DoRA", "lora": "LoRA"}


@dataclass(frozen=True)
class Source:
    """A trained adapter in a folder.

    Attributes:
        folder: where it lies.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        layout: ``"auto"`` for our own format, ``"peft"`` for PEFT's.
        config: what config.json or adapter_config.json holds.
    """

    folder: Path
    method: str
    layout: Layout
    config: dict[str, Any]

    @property
    def base(self) -> str | None:
        """The base it names: a Hub id, an alias, or a folder of the machine it was trained on."""
        return self.config.get("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """The commit of the base it names."""
        return self.config.get("base_model_revision" if self.layout == "auto" else "revision")

    @property
    def base_fingerprint(self) -> str:
        """The hash of the base's weights it was trained on; PEFT's format has no place for one."""
        return str(self.config.get("base_fingerprint") or "unknown")


def read_source(folder: str | Path) -> Source:
    """Read which adapter a folder holds. Nothing of it is run, and torch is not loaded.

    Raises:
        AdapterError: the folder is missing, or holds no adapter that can be published; the message says what to do.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    if (folder / PEFT_CONFIG).is_file():
        config = read_json(folder / PEFT_CONFIG)
        if config.get("peft_type") != "LORA":
            raise AdapterError(
                f"{PEFT_CONFIG}: peft_type={config.get('peft_type')!r}: 'LORA' can be published, nothing else"
            )
        source = Source(folder, "dora" if config.get("use_dora") else "lora", "peft", config)
    else:
        config = read_json(folder / OUR_CONFIG)
        if config.get("model_type") not in ("mixlora", "dora"):
            raise AdapterError(
                f"{OUR_CONFIG}: model_type={config.get('model_type')!r}: an adapter has 'mixlora' or 'dora', "
                f"or {PEFT_CONFIG} beside it"
            )
        source = Source(folder, str(config["model_type"]), "auto", config)
    if not (folder / WEIGHTS).is_file():
        raise AdapterError(f"adapter {folder.name!r}: no {WEIGHTS}; save it with save_pretrained, not as a pickle")
    return source


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
