"""Detect the format, method and size of an adapter folder. Torch is not imported, and no code of the folder is run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from minilora_hub.adapter_folder.code_references import require_no_other_code
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.tasks import CAUSAL_LM, auto_class_of
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import read_header, shown_name

Dialect = Literal["minilora", "peft", "peft-mixlora", "reference", "checkpoint"]
Layout = Literal["auto", "peft"]
Kind = Literal["base", "LoRA", "DoRA", "MixLoRA", "MixDoRA"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter, or a model made from one, in a folder.

    Attributes:
        folder: the folder.
        dialect: ``"minilora"`` (ours), ``"peft"`` (LoRA and DoRA in PEFT's format), ``"peft-mixlora"`` (the PEFT
            method of minilora_hub), ``"reference"`` (the format of `mixlora` and MoE-PEFT), or ``"checkpoint"`` (an
            ordinary model, such as an export).
        method: ``"lora"``, ``"dora"``, ``"mixlora"``, or the architecture of a checkpoint.
        config: content of its configuration file.
    """

    folder: Path
    dialect: Dialect
    method: str
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, or the repo's id where it is a snapshot in the Hub's cache."""
        return shown_name(self.folder)

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
        """The hash of the base's weights it was trained on; ``"unknown"`` in most formats."""
        return self._text("base_fingerprint") or "unknown"

    @property
    def layout(self) -> Layout:
        """How it is published: ``"auto"`` with our code, ``"peft"`` as stock transformers loads it."""
        return "auto" if self.dialect == "minilora" else "peft"

    @property
    def auto_class(self) -> str:
        """The name of the Auto class that loads it, ``"AutoModelForCausalLM"`` for one in PEFT's format."""
        return auto_class_of(self.config) if self.dialect == "minilora" else CAUSAL_LM

    def named_base(self, given: str | None, revision: str | None = None) -> tuple[str | None, str | None]:
        """Return the name and the revision of the base to use.

        Args:
            given: the base that the user names, which wins over the one that the adapter names.
            revision: its revision, where the user names one.
        """
        if given is None or given == self.base:
            return self.base, revision or self.base_revision
        return given, revision

    def _text(self, name: str) -> str | None:
        value = self.config.get(name)
        return value if isinstance(value, str) and value else None


@dataclass(frozen=True)
class AdapterFacts:
    """Facts from an adapter's configuration and the header of its weights.

    Attributes:
        kind: the method.
        detail: one short line, e.g. ``"rank 16, 8 experts, 2 active"``.
        parameters: values in the weights file, which is what the adapter adds to the base.
        experts: of each router, the most where layers differ; 0 where there is none.
        experts_by_layer: the number of each layer; empty where it is the same in all.
    """

    kind: Kind
    detail: str
    parameters: int
    experts: int = 0
    experts_by_layer: tuple[int, ...] = ()


def describe_folder(folder: str | Path) -> AdapterFolder:
    """Detect the dialect of a folder. Use `read_folder` where something of it is going to be loaded.

    Raises:
        AdapterError: there is no such folder, or its dialect is unknown.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterError(f"adapter {str(folder)!r}: no such folder")
    if (folder / PEFT_CONFIG).is_file():
        config = read_json(folder / PEFT_CONFIG)
        kind = config.get("peft_type")
        if kind == "LORA":
            return AdapterFolder(folder, "peft", "dora" if config.get("use_dora") else "lora", config)
        if kind == "MIXLORA":
            # The reference uses this name, too; its strategies have names of its own.
            strategy = config.get("routing_strategy")
            ours = "peft_version" in config or strategy in ("top_k", "top_p")
            return AdapterFolder(folder, "peft-mixlora" if ours else "reference", "mixlora", config)
        raise AdapterError(
            f"adapter {shown_name(folder)!r}: peft_type={kind!r} in {PEFT_CONFIG}: must be 'LORA' or 'MIXLORA'"
        )
    if not (folder / OUR_CONFIG).is_file():
        raise AdapterError(f"adapter {shown_name(folder)!r}: it has neither {OUR_CONFIG} nor {PEFT_CONFIG}")
    config = read_json(folder / OUR_CONFIG)
    kind = config.get("model_type")
    if kind in ("mixlora", "dora"):
        return AdapterFolder(folder, "minilora", str(kind), config)
    architectures = config.get("architectures")
    if isinstance(kind, str) and isinstance(architectures, list) and architectures:
        return AdapterFolder(folder, "checkpoint", str(architectures[0]), config)
    raise AdapterError(
        f"adapter {shown_name(folder)!r}: model_type={kind!r} in {OUR_CONFIG}: neither an adapter nor a model with "
        "architectures"
    )


def read_folder(folder: str | Path) -> AdapterFolder:
    """Detect the dialect of a folder that is going to be loaded.

    Raises:
        AdapterError: there is no such folder, its dialect is unknown, or its configuration refers to code elsewhere.
    """
    found = describe_folder(folder)
    require_no_other_code(found.folder)
    return found


def read_configuration(folder: str | Path) -> AdapterFolder:
    """Read the configuration of an adapter that is not going to be loaded; its weights may be missing.

    Raises:
        AdapterError: as `describe_folder`, or it is neither in our format nor a LoRA or DoRA in PEFT's.
    """
    source = describe_folder(folder)
    if source.dialect == "checkpoint":
        raise AdapterError(f"{source.name!r} is a whole model ({source.method}), not an adapter")
    if source.dialect not in ("minilora", "peft"):
        raise AdapterError(
            f"adapter {source.name!r} is a MixLoRA in the format {source.dialect!r}: convert it with `minilora import`"
        )
    return source


def inspect_source(folder: str | Path) -> AdapterFolder:
    """Read the configuration of an adapter that is not going to be loaded: it may refer to code elsewhere.

    Raises:
        AdapterError: as `read_configuration`, or it has no safetensors weights.
    """
    source = read_configuration(folder)
    if not (source.folder / WEIGHTS).is_file():
        raise AdapterError(f"adapter {source.name!r}: no {WEIGHTS}; save it with save_pretrained, not as a pickle")
    return source


def read_source(folder: str | Path, name: str | None = None) -> AdapterFolder:
    """Read the configuration of an adapter that is going to be loaded.

    Args:
        folder: the adapter.
        name: what an error calls it. Default: the folder's name.

    Raises:
        AdapterError: as `inspect_source`, or it refers to code elsewhere.
    """
    source = inspect_source(folder)
    require_no_other_code(source.folder, name)
    return source


def adapter_facts(folder: Path) -> AdapterFacts:
    """Read an adapter's kind and size; no tensor is read.

    Raises:
        AdapterError: as `read_source`, or its weights are damaged.
    """
    source = read_source(folder)
    settings = source.config
    detail = f"rank {settings.get('r')}"
    patterns = settings.get("rank_pattern")
    ranks = [rank for rank in patterns.values() if isinstance(rank, int)] if isinstance(patterns, dict) else []
    if ranks:
        detail += f" ({min(ranks)} to {max(ranks)} where it differs)"
    kind: Kind = "DoRA" if source.method == "dora" else "LoRA"
    experts = 0
    by_layer: tuple[int, ...] = ()
    if source.method == "mixlora":
        kind = "MixDoRA" if settings.get("use_dora") else "MixLoRA"
        given = settings.get("num_experts") or 0
        by_layer = tuple(map(int, given)) if isinstance(given, list) else ()
        experts = max(by_layer) if by_layer else int(given)
        top_p = settings.get("routing_strategy") == "top_p"
        active = f"top-p {settings.get('router_top_p')}" if top_p else f"{settings.get('num_experts_per_tok')} active"
        detail += f", {experts_text(given)} experts{' on each linear' * bool(settings.get('router_scope'))}, {active}"
    return AdapterFacts(kind, detail, count_values(folder / WEIGHTS), experts, by_layer)


def experts_text(num_experts: Any) -> str:
    """Return a number of experts as text: ``"8"``, or ``"2 to 6"`` for a list with the number of each layer."""
    if not isinstance(num_experts, list) or not all(isinstance(count, int) for count in num_experts):
        return str(num_experts)
    return " to ".join(str(count) for count in sorted({min(num_experts), max(num_experts)}))


def only_ours(config: Mapping[str, Any]) -> str | None:
    """Return the setting of a MixLoRA that no other format and engine knows, as ``name=value``; None without one."""
    if config.get("router_scope") is not None:
        return f"router_scope={config['router_scope']!r}"
    count = config.get("num_experts")
    return f"num_experts={count!r}" if isinstance(count, list) else None


def count_values(weights: Path) -> int:
    """Count the values in a safetensors file from its header.

    Raises:
        AdapterError: it is no safetensors file.
    """
    refuse_lfs_pointer(weights)
    header, _ = read_header(weights)
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


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
    """Write indented JSON, the same bytes on every system."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def refuse_lfs_pointer(path: Path) -> None:
    """Raise an AdapterError where a file is a Git LFS pointer, which Git leaves in place of a file it did not fetch.

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


@contextmanager
def naming(name: str, base: str | None = None) -> Iterator[None]:
    """Add an adapter's name, and that of the base it was to fit, to AdapterErrors that lack them."""
    try:
        yield
    except AdapterError as error:
        start = "" if name in str(error) else f"adapter {name!r}: "
        end = "" if base is None or base in str(error) else f" (base {base!r})"
        raise AdapterError(f"{start}{error}{end}") from error
