"""Everything that recorded logits depend on, by name. A recording is used again only where all of it is the same.

    adapter/…     sha256 of the weights and of the configuration
    tokenizer/…   sha256 of every tokenizer file: the adapter's, or the base's where the adapter has none
    base/…        fingerprint of the base's weights, which are hashed again only if they were touched since (they are
                  large; see `weights_stamp`); sha256 of every JSON file beside them (configuration, index)
    code/…        sha256 of the island, which the model is made of, and of the code that records
    library/…     full versions of the libraries that tokenise, load and compute
    dtype         the one that is asked for

Not in it: the processor and the number of threads, which move logits by less than the tolerance they are compared with.
Nothing here loads the base.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from minilora_hub.bases import ResolvedBase
from minilora_hub.formats.folders import COMPANIONS, TOKENIZER_FILES, read_json
from minilora_hub.recording.bases_of_record import wanted_dtype
from minilora_hub.recording.sources import OUR_CONFIG, PEFT_CONFIG, WEIGHTS, Source

Digest = Callable[[Path], str]

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "bitsandbytes")
"""Their full versions: a build for CUDA is another library than one for the processor. accelerate places weights for
PEFT; bitsandbytes computes on a base that is quantised with it."""
GENERATION = "generation_config.json"
TOKENIZING = tuple(name for name in COMPANIONS if name not in (GENERATION, "chat_template.jinja"))

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.index.json")

PACKAGE = Path(__file__).resolve().parents[1]
CODE = ("remote_code/*.py", "recording/*.py", "formats/peft.py", "tensor_names.py")


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
    found |= {f"tokenizer/{name}": digest(tokenizer / name) for name in TOKENIZING if (tokenizer / name).is_file()}
    found |= {"base/fingerprint": fingerprint, "dtype": wanted_dtype(base)}
    beside = (path for path in sorted(base.path.glob("*.json")) if path.name not in COMPANIONS)
    found |= {f"base/{path.name}": digest(path) for path in beside}
    return found | code_inputs() | library_inputs()


def why_unknown(base: ResolvedBase, fingerprint: str) -> str | None:
    """Say why what a base computes does not follow from `inputs_of`; None where it does."""
    if not fingerprint.startswith("sha256:"):
        return "the base's weights have no fingerprint"
    if (base.path / PEFT_CONFIG).is_file():
        return "the base has an adapter of its own"
    settings = read_json(base.path / "config.json").get("quantization_config") or {}
    method = settings.get("quant_method", "bitsandbytes") if isinstance(settings, dict) else "unknown"
    return None if method == "bitsandbytes" else f"the base is quantised ({method})"


@cache
def code_inputs() -> dict[str, str]:
    """Hash the code that makes up the model and that records it."""
    paths = sorted(path for pattern in CODE for path in PACKAGE.glob(pattern))
    return {f"code/{path.relative_to(PACKAGE).as_posix()}": file_digest(path) for path in paths}


@cache
def library_inputs() -> dict[str, str]:
    """Return the versions of the libraries that compute logits, as far as they are installed."""
    found = {}
    for name in LIBRARIES:
        try:
            found[f"library/{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def changes(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Return the names of what is not the same, sorted."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
