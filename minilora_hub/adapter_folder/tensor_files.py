"""Strict reading of adapter tensors that come from anywhere: safetensors, shards of it, and pickles without code.

A file from outside may lie about its size, name a tensor twice, point out of its folder, or hold a pickle that runs
code when it is loaded. All of that is refused by name, before memory is taken for it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import read_json, refuse_lfs_pointer
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    import torch

SAFETENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
INDEX = SAFETENSORS + ".index.json"
TENSOR_FILES = (SAFETENSORS, INDEX, PICKLE)
MAX_HEADER = 100 * 2**20  # as in the safetensors library
SHARD = re.compile(r"\w[\w.-]*\.safetensors")


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of an adapter, copied into memory: from safetensors where there is one, else from the pickle.

    Raises:
        AdapterError: there is no such file, it is damaged or hostile, or a tensor is not floating-point or not finite.
    """
    if (folder / SAFETENSORS).is_file():
        tensors = read_safetensors(folder / SAFETENSORS)
    elif (folder / INDEX).is_file():
        tensors = _read_shards(folder)
    elif (folder / PICKLE).is_file():
        tensors = read_pickle(folder / PICKLE)
    else:
        raise AdapterError(f"adapter {folder.name!r}: none of {', '.join(TENSOR_FILES)} is there")
    if not tensors:
        raise AdapterError(f"adapter {folder.name!r}: its weights hold no tensor")
    for name, tensor in tensors.items():
        _check_values(name, tensor)
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file, after a look at its header.

    Raises:
        AdapterError: the header is larger than the file, is no JSON or names a tensor twice, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        refuse_lfs_pointer(path)
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(size - 8, MAX_HEADER):
                raise AdapterError(f"{path.name}: its header claims {length:,} bytes, the file has {size:,}")
            strict_json(file.read(length))  # safetensors itself takes the last of two tensors of one name
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (safe_open is not a mapping)
                tensors[name] = opened.get_tensor(name).clone()
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"{path.name} is not a readable safetensors file: {error}") from error
    return tensors


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a ``.bin`` that torch.save wrote, with ``weights_only=True``: nothing in it is run.

    Raises:
        AdapterError: it needs more than tensors, is damaged, or holds something that would grow in memory.
    """
    import torch

    refuse_lfs_pointer(path)
    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise AdapterError(f"{path.name} is damaged: {error}") from error
        if unpacked > size:
            raise AdapterError(
                f"{path.name} would unpack from {size:,} to {unpacked:,} bytes: torch.save packs nothing"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on old storage classes, which are what such files hold
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can make any part of the reader stumble
        reason = " ".join(str(error).split())[:200]
        raise AdapterError(
            f"{path.name} is not a plain pickle of tensors, and is not read in any other way "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise AdapterError(f"{path.name} must hold a dictionary of named tensors, got a {type(content).__name__}")
    total = 0
    for name, tensor in content.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise AdapterError(f"{path.name}: {name} is a {_kind(tensor)}, a plain tensor is required")
        if tensor.device.type != "cpu" or tensor.is_quantized:
            raise AdapterError(f"{path.name}: {name} is on {tensor.device} or quantised, a plain tensor is required")
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise AdapterError(
                f"{path.name}: {name} has shape {tuple(tensor.shape)}, for which it holds too few values"
            )
        total += tensor.nbytes
    if total > 8 * size:
        raise AdapterError(f"{path.name}: its tensors would take {total:,} bytes, the file has {size:,}")
    return {name: tensor.detach().clone().contiguous() for name, tensor in content.items()}


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file tensor by tensor, without a second copy of them in memory."""
    import os

    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)  # save_file leaves a file that only its owner may read


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    places = read_json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise AdapterError(f"{INDEX}: weight_map must say which file each tensor is in")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise AdapterError(f"{INDEX}: {name} is said to be in {shard!r}: must be a safetensors file of this folder")
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        found = read_safetensors(folder / shard)
        for name, tensor in found.items():
            if name in tensors:
                raise AdapterError(f"{INDEX}: {name} is in two files")
            if places.get(name) != shard:
                raise AdapterError(f"{shard} holds {name}, which {INDEX} does not list there")
            tensors[name] = tensor
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise AdapterError(f"{INDEX} lists {missing[0]}, which is not in {places[missing[0]]}")
    return tensors


def _check_values(name: str, tensor: torch.Tensor) -> None:
    import torch

    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise AdapterError(f"{name} has dtype {tensor.dtype}: float32, float16, bfloat16 or float64 is required")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} holds values that are not finite")


def _kind(value: Any) -> str:
    layout = getattr(value, "layout", None)
    return f"{type(value).__name__} ({layout})" if layout is not None else type(value).__name__
