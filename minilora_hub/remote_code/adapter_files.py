"""Read and write an adapter's tensors, strictly, and find and fingerprint the files of its base."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .file_hashes import file_sha256

ADAPTER_FILE = "adapter_model.safetensors"
CODE_FILES = (
    "adapted_linear.py", "adapted_model.py", "adapter_files.py", "attach.py", "base_delegation.py", "base_loading.py",
    "base_structure.py", "configuration_adapter.py", "configuration_minilora.py", "device_slots.py", "expert_slots.py",
    "feed_forward.py", "few_rows.py", "file_hashes.py", "fused_experts.py", "heads.py", "layer_stacks.py",
    "linear_layers.py", "mixlora_model.py", "mixture.py", "modeling_minilora.py", "probe.py", "routed_linear.py",
    "routing.py", "routing_record.py", "saving.py", "trainer_support.py", "trial_inputs.py",
)  # fmt: skip
CHECKPOINT_FILES = tuple(f + end for f in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
UNKNOWN = "unknown"
BASE_ALIASES: dict[str, Callable[[], str]] = {}
"""Base names that are neither folders nor Hub ids: alias -> function that returns a local folder. minilora_hub adds
some.
"""


def write_adapter(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> None:
    """Write {name: tensor} to a safetensors file, atomically."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        # Not save_file, which leaves a file that only its owner may read.
        Path(temporary).write_bytes(save(contiguous, metadata={"format": "pt"}))
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_adapter(
    path: str | os.PathLike[str], expected: Mapping[str, Sequence[int]] | None = None
) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into memory and check it.

    `expected` is {name: shape} that the file must hold, no more and no less. None: any names and shapes.

    Raises:
        ValueError: the file is damaged, or a tensor is missing, surplus, misshapen or not finite; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            # Copied: a mapped tensor's alignment changes what the matrix library computes for one row.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); download or save it again") from error
    if expected is not None:
        check_tensors(path, tensors, expected)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has dtype {tensor.dtype}, a floating-point dtype is required")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} holds values that are not finite")
    return tensors


def check_tensors(path: Any, tensors: Mapping[str, Any], expected: Mapping[str, Sequence[int]]) -> None:
    """Raise a ValueError that names a tensor that is missing, surplus, or of another shape than `expected`."""
    both = {"missing": expected.keys() - tensors.keys(), "surplus": tensors.keys() - expected.keys()}
    if parts := [f"{what} {first_names(sorted(names))}" for what, names in both.items() if names]:
        raise ValueError(f"{path} does not fit this configuration and base: {'; '.join(parts)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != tuple(shape):
            raise ValueError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, "
                f"this configuration and base require {tuple(shape)}"
            )


def first_names(names: Sequence[str], count: int = 3) -> str:
    """List the first few names, and say how many there are."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "") + f" ({len(names)} in all)" * (rest > 0)


def base_source(name: str) -> str:
    """Return the folder or Hub id that a base's name stands for."""
    return BASE_ALIASES[name]() if name in BASE_ALIASES else name


def base_fingerprint(name_or_path: str, revision: str | None = None, cache_dir: Any = None) -> str:
    """Hash a base's checkpoint files, which do not depend on dtype and quantisation: ``"sha256:<hex>"``.

    Nothing is downloaded: a Hub id is looked up in the local cache. Without files it is ``"unknown"``.
    """
    for name in CHECKPOINT_FILES:
        first = _local_file(name_or_path, name, revision, cache_dir)
        if first is None:
            continue
        names = [name]
        if name.endswith(".index.json"):
            names = sorted(set(json.loads(Path(first).read_text(encoding="utf-8"))["weight_map"].values()))
        digest = hashlib.sha256()
        for part in names:
            file = _local_file(name_or_path, part, revision, cache_dir)
            if file is None:
                return UNKNOWN
            digest.update(f"{part}:{_file_sha256(file)}\n".encode())
        return f"sha256:{digest.hexdigest()}"
    return UNKNOWN


def cached_commit(name_or_path: str, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """Return the commit of a Hub id's `revision` in the local cache; None for a folder or an unknown id."""
    folder = None if os.path.isdir(name_or_path) else local_folder(name_or_path, revision, cache_dir)
    return None if folder is None else os.path.basename(folder)


def local_folder(name_or_path: str, revision: str | None = None, cache_dir: Any = None) -> str | None:
    """Return the folder of a base on this machine, or a Hub id's snapshot in the local cache; None if there is none."""
    config = _local_file(name_or_path, "config.json", revision, cache_dir)
    return None if config is None else os.path.dirname(config)


def _local_file(name_or_path: str, name: str, revision: str | None, cache_dir: Any) -> str | None:
    if os.path.isdir(name_or_path):
        path = os.path.join(name_or_path, name)
        return path if os.path.isfile(path) else None
    found = try_to_load_from_cache(str(name_or_path), name, cache_dir=cache_dir, revision=revision)
    return found if isinstance(found, str) else None


def _file_sha256(path: str) -> str:
    # The Hub's cache names a large file's blob by its sha256, and the snapshot links to it.
    blob = os.path.basename(os.path.realpath(path))
    if os.path.islink(path) and len(blob) == 64:
        return blob
    return file_sha256(path)
