"""Read the configuration and the tensors of an untrusted adapter folder strictly.

A weights file may claim a wrong size, name a tensor twice, refer to files outside its folder, or be a pickle that runs
code when it is loaded. Each of these is refused by name, before memory is allocated for it.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import AdapterFolder, naming, read_json, refuse_lfs_pointer
from minilora_hub.adapter_folder.names import PICKLE, WEIGHTS, WEIGHTS_INDEX
from minilora_hub.adapter_folder.results import RESULTS_FILE, Results
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.hub.plain_files import read_header, shown_name

if TYPE_CHECKING:
    import torch

SHARD = re.compile(r"\w[\w.-]*\.safetensors")
UNKNOWN = "unknown"


def fingerprint_trained_on(source: AdapterFolder) -> str:
    """Return the fingerprint of the base that an adapter was trained on, ``"unknown"`` where the folder has none.

    PEFT's format has no place for it, but results.json beside it has.
    """
    known = source.base_fingerprint
    if known == UNKNOWN and (source.folder / RESULTS_FILE).is_file():
        known = Results.load(source.folder).base.fingerprint or UNKNOWN
    return known


def notes_on_base(base: BaseSource, *sources: AdapterFolder) -> list[str]:
    """Return a note for each adapter that was trained on other weights than those of the base it is written for."""
    return [
        f"{source.name} was trained on a base with fingerprint {trained_on[:19]}…, and {base.name!r} has "
        f"{base.fingerprint[:19]}…: what is written may answer differently than it did in training"
        for source in sources
        if (trained_on := fingerprint_trained_on(source)) != UNKNOWN and base.fingerprint not in (UNKNOWN, trained_on)
    ]


# ---- our format ----


def read_ours(source: AdapterFolder, base: BaseSource) -> tuple[Any, dict[str, torch.Tensor], list[Any]]:
    """Read a folder in our format and check it against the base.

    Returns:
        The configuration, ``{canonical name: tensor}``, and the sites.

    Raises:
        AdapterError: the configuration or a tensor is wrong.
    """
    with naming(source.name, base.name):
        config = our_config(source)
        tensors = read_tensors(source.folder)
        return config, tensors, check_against_base(config, tensors, base)


def our_config(source: AdapterFolder) -> Any:
    """Return the MixLoraConfig or DoraConfig of a folder in our format.

    Raises:
        AdapterError: a field is out of range.
    """
    from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig

    kind: Any = MixLoraConfig if source.method == "mixlora" else DoraConfig
    try:
        return kind.from_dict(dict(source.config))
    except Exception as error:  # a damaged file may fail anywhere in transformers
        raise AdapterError(f"config.json does not load: {' '.join(str(error).split())[:300]}") from error


def check_against_base(
    config: Any, tensors: dict[str, torch.Tensor], base: BaseSource, file: str = WEIGHTS
) -> list[Any]:
    """Check that tensors are exactly those of this configuration on this base, and return the sites.

    Raises:
        AdapterError: the configuration does not fit the base, or a tensor is missing, surplus or misshapen; the message
            names the field or the tensor.
    """
    from minilora_hub.remote_code.adapter_files import check_tensors
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import plan_sites

    try:
        sites: list[Any] = plan_sites(base.skeleton, config)
        expected = expected_tensors(config, sites)
        check_tensors(file, tensors, expected)
    except ValueError as error:
        raise AdapterError(f"{error} (base {base.name!r})") from error
    return sites


# ---- tensors of any format ----


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read every tensor of an adapter, copied into memory: from safetensors where there is one, else from the pickle.

    Raises:
        AdapterError: there is no such file, it is damaged or hostile, or a tensor is not floating-point or not finite.
    """
    if (folder / WEIGHTS).is_file():
        tensors = read_safetensors(folder / WEIGHTS)
    elif (folder / WEIGHTS_INDEX).is_file():
        tensors = _read_shards(folder)
    elif (folder / PICKLE).is_file():
        tensors = read_pickle(folder / PICKLE)
    else:
        raise AdapterError(f"adapter {shown_name(folder)!r}: it has none of {WEIGHTS}, {WEIGHTS_INDEX} and {PICKLE}")
    if not tensors:
        raise AdapterError(f"adapter {shown_name(folder)!r}: its weights hold no tensor")
    for name, tensor in tensors.items():
        check_values(name, tensor)
    return tensors


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file after a strict check of its header.

    Raises:
        AdapterError: the header does not fit the file, is not JSON or names a tensor twice, or the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        refuse_lfs_pointer(path)
        read_header(path)  # safetensors itself takes the last of two tensors of one name
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"{path.name} is not a readable safetensors file: {error}") from error


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
                f"{path.name} would unpack from {size:,} to {unpacked:,} bytes: torch.save does not compress"
            )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old storage classes, which such files contain
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may fail anywhere in torch
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


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    places = read_json(folder / WEIGHTS_INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise AdapterError(f"{WEIGHTS_INDEX}: weight_map must name the file of each tensor")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise AdapterError(
                f"{WEIGHTS_INDEX}: {name} is in {shard!r}, which must be a safetensors file of this folder"
            )
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(places.values())):
        found = read_safetensors(folder / shard)
        for name, tensor in found.items():
            if name in tensors:
                raise AdapterError(f"{WEIGHTS_INDEX}: {name} is in two files")
            if places.get(name) != shard:
                raise AdapterError(f"{shard} holds {name}, which {WEIGHTS_INDEX} does not list there")
            tensors[name] = tensor
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise AdapterError(f"{WEIGHTS_INDEX} lists {missing[0]}, which is not in {places[missing[0]]}")
    return tensors


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise an AdapterError unless a tensor is floating-point, of at least 16 bits, and finite."""
    import torch

    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise AdapterError(f"{name} has dtype {tensor.dtype}: float32, float16, bfloat16 or float64 is required")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{name} holds values that are not finite")


def _kind(value: Any) -> str:
    layout = getattr(value, "layout", None)
    return f"{type(value).__name__} ({layout})" if layout is not None else type(value).__name__
