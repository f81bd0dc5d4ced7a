"""Which dialect an adapter folder is written in. Torch is not loaded, and nothing of the folder is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora_hub.adapter_folder.code_references import require_no_other_code
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError

Dialect = Literal["minilora", "peft", "peft-mixlora", "reference", "checkpoint"]
Layout = Literal["auto", "peft"]

OUR_CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# What transformers reads beside the weights. Everything else in the folder of a training run stays at home.
COMPANIONS = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter, or a model made from one, in a folder.

    Attributes:
        folder: where it lies.
        dialect: ``"minilora"`` (ours), ``"peft"`` (LoRA and DoRA in PEFT's format), ``"peft-mixlora"`` (the PEFT
            method of minilora_hub), ``"reference"`` (the format of `mixlora` and MoE-PEFT), or ``"checkpoint"`` (an
            ordinary model, such as an export).
        method: ``"lora"``, ``"dora"``, ``"mixlora"``, or the architecture of a checkpoint.
        config: what its configuration file holds.
    """

    folder: Path
    dialect: Dialect
    method: str
    config: dict[str, Any]

    @property
    def base(self) -> str | None:
        """The base it names."""
        return self._text("base_model_name_or_path")

    @property
    def base_revision(self) -> str | None:
        """The commit of the base it names."""
        return self._text("base_model_revision" if self.dialect == "minilora" else "revision")

    @property
    def base_fingerprint(self) -> str:
        """The hash of the base's weights it was trained on; most formats have no place for one."""
        return self._text("base_fingerprint") or "unknown"

    @property
    def layout(self) -> Layout:
        """How it is published: ``"auto"`` with our code, ``"peft"`` as stock transformers loads it."""
        return "auto" if self.dialect == "minilora" else "peft"

    def _text(self, name: str) -> str | None:
        value = self.config.get(name)
        return value if isinstance(value, str) and value else None


def read_folder(folder: str | Path) -> AdapterFolder:
    """Tell which dialect a folder is written in, before something of it is loaded.

    Raises:
        AdapterError: there is no such folder, it holds nothing that is known here, or it leads to code elsewhere.
    """
    found = describe_folder(folder)
    require_no_other_code(found.folder)
    return found


def describe_folder(folder: str | Path) -> AdapterFolder:
    """Tell which dialect a folder is written in, where nothing of it is to be loaded.

    Raises:
        AdapterError: there is no such folder, or it holds nothing that is known here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    if (folder / ADAPTER_CONFIG).is_file():
        config = read_json(folder / ADAPTER_CONFIG)
        kind = config.get("peft_type")
        if kind == "LORA":
            return AdapterFolder(folder, "peft", "dora" if config.get("use_dora") else "lora", config)
        if kind == "MIXLORA":
            # Both call themselves MIXLORA; the reference's strategies are its own names.
            strategy = config.get("routing_strategy")
            ours = "peft_version" in config or strategy in ("top_k", "top_p")
            return AdapterFolder(folder, "peft-mixlora" if ours else "reference", "mixlora", config)
        raise AdapterError(
            f"adapter {folder.name!r}: peft_type={kind!r} in {ADAPTER_CONFIG}: 'LORA' and 'MIXLORA' are understood, "
            "nothing else"
        )
    if not (folder / OUR_CONFIG).is_file():
        raise AdapterError(f"adapter {folder.name!r}: neither {OUR_CONFIG} nor {ADAPTER_CONFIG} is there")
    config = read_json(folder / OUR_CONFIG)
    kind = config.get("model_type")
    if kind in ("mixlora", "dora"):
        return AdapterFolder(folder, "minilora", str(kind), config)
    architectures = config.get("architectures")
    if isinstance(kind, str) and isinstance(architectures, list) and architectures:
        return AdapterFolder(folder, "checkpoint", str(architectures[0]), config)
    raise AdapterError(
        f"adapter {folder.name!r}: model_type={kind!r} in {OUR_CONFIG}: neither an adapter nor a model with "
        "architectures"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        AdapterError: it is missing or is not one.
    """
    try:
        refuse_lfs_pointer(path)
        content = strict_json(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"adapter {path.parent.name!r}: no {path.name}") from None
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.parent.name}/{path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path.parent.name}/{path.name} must hold a JSON object, got a {type(content).__name__}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON for people, the same bytes on every system."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put an adapter's name before the message of an AdapterError that does not hold it: there may be several."""
    try:
        yield
    except AdapterError as error:
        if name in str(error):
            raise
        raise AdapterError(f"adapter {name!r}: {error}") from error


def refuse_lfs_pointer(path: Path) -> None:
    """Raise an AdapterError where a file is what Git leaves in place of a large one that it did not fetch.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise AdapterError(
            f"{path.name} is a Git LFS pointer, not the file itself: fetch it with `git lfs pull`, or download the "
            "repo with `hf download`"
        )


class Settings:
    """The fields of a configuration from outside, each read with its type; what was not asked for can be told.

    Args:
        content: the fields.
        file: the name that errors say.
    """

    def __init__(self, content: dict[str, Any], file: str = ADAPTER_CONFIG) -> None:
        self.content, self.file, self.asked = content, file, set[str]()

    def get(self, name: str, kinds: type | tuple[type, ...], default: Any = None) -> Any:
        """Return a field; `default` where it is missing or null.

        Raises:
            AdapterError: it is of another type.
        """
        self.asked.add(name)
        value = self.content.get(name)
        if value is None:
            return default
        allowed = kinds if isinstance(kinds, tuple) else (kinds,)
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise self.error(name, f"must be of type {' or '.join(kind.__name__ for kind in allowed)}")
        return value

    def require(self, name: str, kinds: type | tuple[type, ...]) -> Any:
        """Return a field that must be there.

        Raises:
            AdapterError: it is missing or of another type.
        """
        value = self.get(name, kinds)
        if value is None:
            raise AdapterError(f"{self.file}: {name} is missing")
        return value

    def error(self, name: str, need: str) -> AdapterError:
        """Build the error about a field: file, name, value received, what is required."""
        shown = repr(self.content.get(name))
        return AdapterError(f"{self.file}: {name}={shown[:120]}: {need}")
