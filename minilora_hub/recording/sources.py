"""What lies in a folder that is to be recorded or published: its kind, its settings, the base it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.errors import AdapterError
from minilora_hub.formats.folders import read_json

Layout = Literal["auto", "peft"]

WEIGHTS = "adapter_model.safetensors"
OUR_CONFIG, PEFT_CONFIG = "config.json", "adapter_config.json"


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
    source = read_configuration(folder)
    if not (source.folder / WEIGHTS).is_file():
        raise AdapterError(
            f"adapter {source.folder.name!r}: no {WEIGHTS}; save it with save_pretrained, not as a pickle"
        )
    return source


def read_configuration(folder: str | Path) -> Source:
    """Read which adapter a folder describes, whose weights need not be there yet.

    Raises:
        AdapterError: the folder is missing, or describes no adapter that can be published.
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
        return Source(folder, "dora" if config.get("use_dora") else "lora", "peft", config)
    config = read_json(folder / OUR_CONFIG)
    if config.get("model_type") not in ("mixlora", "dora"):
        raise AdapterError(
            f"{OUR_CONFIG}: model_type={config.get('model_type')!r}: an adapter has 'mixlora' or 'dora', "
            f"or {PEFT_CONFIG} beside it"
        )
    return Source(folder, str(config["model_type"]), "auto", config)
