"""Find entries in an adapter's files that make transformers or PEFT load code. Nothing is run; torch is not needed.

With `trust_remote_code=True` the Auto classes import the classes that `auto_map` names: in the configuration of the
model, of its tokenizer, of a processor. An entry such as ``"someone/else--x.Y"`` imports them from another repo, so a
hash over a repo's own Python files says nothing about what runs. A folder ``custom_generate/`` replaces ``generate``,
an attention implementation such as ``"someone/kernel"`` is compiled code from the Hub, and PEFT imports a module that
`megatron_core` names. An adapter needs none of these except the entries for its own two or three classes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.names import GENERATION, OUR_CONFIG, PEFT_CONFIG
from minilora_hub.adapter_folder.tasks import is_own_auto_map
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import shown_name

CONFIGURATION_FILES = (
    PEFT_CONFIG,
    OUR_CONFIG,
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""The configuration files that transformers and PEFT read, under their usual names."""
LARGEST = 64 * 2**20
CUSTOM_GENERATE = "custom_generate"
MODULE_AND_CLASS = re.compile(r"(?P<module>[A-Za-z_]\w*)\.[A-Za-z_]\w*", re.ASCII)
ATTENTION_FIELDS = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
WATCHED = {"auto_map", CUSTOM_GENERATE, "megatron_config", *ATTENTION_FIELDS}
REMEDY = "remove it, an adapter needs no code but its own"


@dataclass(frozen=True)
class CodeReference:
    """Something that makes a library load code.

    Attributes:
        file: the file or folder with the reference, by its path in the adapter's folder.
        text: the entry, in words.
        problem: why the adapter is not loaded; None where the code is in the adapter's own folder.
        own: whether it is an entry of config.json that names exactly minilora_hub's classes.
    """

    file: str
    text: str
    problem: str | None = None
    own: bool = False

    def __str__(self) -> str:
        """Return a one-line description."""
        return f"{self.file}: {self.text}" + (f": {self.problem}" if self.problem else "")


def code_references(folder: Path, files: Collection[str] | None = None) -> list[CodeReference]:
    """Find everything in an adapter's folder that makes transformers or PEFT load code.

    Args:
        folder: the folder; its configuration files are read, and those of its folder ``peft``.
        files: paths of all the adapter's files, where only some of them are in `folder`. Default: those in it.

    Raises:
        AdapterError: a configuration file cannot be read.
    """
    if files is None:
        files = {path.name for path in folder.iterdir()}
    found: list[CodeReference] = []
    for path in (*sorted(folder.glob("*")), *sorted(folder.glob("peft/*"))):
        # By what the name holds, as transformers also reads e.g. config.5.0.json; and some systems ignore case.
        if "config" in path.name.lower() and path.suffix.lower() == ".json" and path.is_file():
            found += _references_in(path, path.relative_to(folder).as_posix(), files)
    if any(name.lower().split("/")[0] == CUSTOM_GENERATE for name in files):
        found.append(CodeReference(f"{CUSTOM_GENERATE}/", "holds code that replaces generate()", REMEDY))
    return found


def require_no_other_code(folder: Path, name: str | None = None) -> None:
    """Check that an adapter does not refer to code outside its own folder, before any of it is loaded.

    Args:
        folder: the adapter.
        name: what the error calls it. Default: the folder's name.

    Raises:
        AdapterError: it does; the message names the file and the entry.
    """
    for reference in code_references(folder):
        if reference.problem:
            raise AdapterError(f"adapter {name or shown_name(folder)!r} is not loaded: {reference}")


def _references_in(path: Path, file: str, files: Collection[str]) -> Iterator[CodeReference]:
    found: list[tuple[str, Any, dict[str, Any]]] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        # From the pairs: of a key that occurs twice, either may be the one that a parser takes.
        found.extend((key, value, fields) for key, value in pairs if key in WATCHED)
        return fields

    try:
        if (size := path.stat().st_size) > LARGEST:
            yield CodeReference(file, f"has {size:,} bytes", f"it is not read, a configuration has at most {LARGEST:,}")
            return
        json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=collect)
    except OSError as error:
        raise AdapterError(f"{file} cannot be read: {error}") from error
    except RecursionError:  # where transformers calls the same parser, the stack may have room for it
        yield CodeReference(file, "is nested too deeply", "it is not read")
        return
    except ValueError:
        return  # transformers cannot read it either
    for key, value, fields in found:
        if key == "auto_map":
            own = path.name == OUR_CONFIG and is_own_auto_map(value, fields.get("model_type"))
            yield from (
                [CodeReference(file, "auto_map names our classes", own=True)] if own else _of_map(value, file, files)
            )
        elif key == CUSTOM_GENERATE and value is not None:
            yield CodeReference(
                file, f"custom_generate={str(value)[:100]!r} names code that replaces generate()", REMEDY
            )
        elif key == "megatron_config" and value:
            yield CodeReference(file, "megatron_config makes PEFT import the module that megatron_core names", REMEDY)
        elif key in ATTENTION_FIELDS and any("/" in text for text in _texts(value)):
            yield CodeReference(file, f"{key}={str(value)[:100]!r} names a kernel on the Hub, which is code", REMEDY)


def _of_map(value: Any, file: str, files: Collection[str]) -> Iterator[CodeReference]:
    """References of an `auto_map` that is not simply our own."""
    for text in _texts(value):
        said = f"auto_map names {text[:100]!r}"
        named = MODULE_AND_CLASS.fullmatch(text)
        if "--" in text:
            yield CodeReference(file, said, f"code of another repo; {REMEDY}")
        elif named is None:
            yield CodeReference(file, said, f"that is no module.Class; {REMEDY}")
        elif f"{named['module']}.py" not in files:
            yield CodeReference(file, said, f"there is no {named['module']}.py beside it; {REMEDY}")
        else:
            yield CodeReference(file, said)


def _texts(value: Any) -> Iterator[str]:
    """Every value in it as a text: entries are texts, lists of texts and None, or further objects."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)
