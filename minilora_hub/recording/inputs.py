"""Everything that recorded logits depend on, by name. A recording is used again only where all of it is the same.

    adapter/…     sha256 of the weights and of the configuration
    tokenizer/…   sha256 of every tokenizer file: the adapter's, or the base's where the adapter has none
    base/…        fingerprint of the base's weights, which are hashed again only if they were touched since (they are
                  large; see `weights_stamp`); sha256 of every JSON file beside them (configuration, index)
    code/…        sha256 of the code that records, and of everything of ours that it imports
    library/…     full versions of the libraries that tokenise, load and compute
    dtype         the one that is asked for

Not in it: the processor and the number of threads, which move logits by less than the tolerance they are compared with.
Nothing here loads the base.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import read_json
from minilora_hub.adapter_folder.names import (
    COMPANIONS,
    OUR_CONFIG,
    PEFT_CONFIG,
    TEMPLATE,
    TOKENIZER_FILES,
    TOKENIZING,
    WEIGHTS,
)
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.code_inputs import code_inputs, library_inputs
from minilora_hub.recording.bases_of_record import wanted_dtype

Digest = Callable[[Path], str]

HASHED = tuple(name for name in TOKENIZING if name != TEMPLATE)
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")

# Hashed as this module is imported: what a file says later is not what this process runs.
CODE_AND_LIBRARIES = code_inputs("minilora_hub.recording.reference") | library_inputs()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_folder(source: Source, base: ResolvedBase) -> Path:
    """Return where the adapter's tokenizer lies. PEFT saves none: then it is the base's, all of it."""
    own = any((source.folder / name).is_file() for name in TOKENIZER_FILES)
    return source.folder if own else base.path


def weights_stamp(base: ResolvedBase) -> str:
    """Return what is another text once a weight file of the base was written to, replaced or moved.

    Size, times, inode and device of each: the system sets the time of the last change itself, so a file that was
    changed and given its old date is found, too. Empty where there is no such time (Windows): then nothing may be told
    from it.
    """
    if os.name != "posix":
        return ""
    stamps = []
    for path in sorted(path for pattern in WEIGHT_FILES for path in base.path.glob(pattern)):
        status = path.stat()
        times = (status.st_mtime_ns, status.st_ctime_ns)
        stamps.append((path.name, status.st_size, *times, status.st_ino, status.st_dev))
    return hashlib.sha256(repr(stamps).encode()).hexdigest()


def inputs_of(source: Source, base: ResolvedBase, fingerprint: str, digest: Digest = file_digest) -> dict[str, str]:
    """Return everything that the logits of an adapter on its base depend on.

    Args:
        source: the adapter.
        base: its base, on this machine.
        fingerprint: of the base's weights.
        digest: hashes a file.
    """
    config = OUR_CONFIG if source.layout == "auto" else PEFT_CONFIG
    tokenizer = tokenizer_folder(source, base)
    found = {f"adapter/{name}": digest(source.folder / name) for name in (config, WEIGHTS)}
    found |= {f"tokenizer/{name}": digest(tokenizer / name) for name in HASHED if (tokenizer / name).is_file()}
    found |= base_inputs(base, fingerprint, digest)
    return found | {"dtype": wanted_dtype(base)} | CODE_AND_LIBRARIES


def base_inputs(base: ResolvedBase, fingerprint: str, digest: Digest = file_digest) -> dict[str, str]:
    """Return what a base's logits depend on: its weights, and the JSON files beside them, tokenizer aside."""
    beside = (path for path in sorted(base.path.glob("*.json")) if path.name not in COMPANIONS)
    return {"base/fingerprint": fingerprint} | {f"base/{path.name}": digest(path) for path in beside}


def why_unknown(base: ResolvedBase, fingerprint: str) -> str | None:
    """Say why what a base computes does not follow from `inputs_of`; None where it does."""
    if not fingerprint.startswith("sha256:"):
        return "the base's weights have no fingerprint"
    if (base.path / PEFT_CONFIG).is_file():
        return "the base has an adapter of its own"
    settings = read_json(base.path / "config.json").get("quantization_config") or {}
    method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else "unknown"
    return None if method == "bitsandbytes" else f"the base is quantised ({method})"
