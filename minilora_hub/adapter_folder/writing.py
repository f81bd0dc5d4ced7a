"""Our own format: written from a configuration and tensors, without the base's weights; and read strictly."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.folders import AdapterFolder
from minilora_hub.adapter_folder.tensor_files import SAFETENSORS, read_tensors
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    import torch

CLASSES = {"mixlora": "MixLora", "dora": "Dora"}


def plan(config: Any, base: BaseSource) -> tuple[list[Any], dict[str, tuple[int, ...]]]:
    """Return the sites of an adapter on `base`, and ``{canonical name: shape}`` of its tensors.

    Raises:
        AdapterError: the configuration does not fit the base; the message names the field.
    """
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import plan_sites

    try:
        sites = plan_sites(base.skeleton, config)
        return sites, dict(expected_tensors(config, sites))
    except ValueError as error:
        raise AdapterError(str(error)) from error


def check_against_base(
    config: Any, tensors: dict[str, torch.Tensor], base: BaseSource, file: str = SAFETENSORS
) -> list[Any]:
    """Check that tensors are exactly those of this configuration on this base, and return the sites.

    Raises:
        AdapterError: one is missing, surplus or misshapen; the message names it.
    """
    from minilora_hub.remote_code.adapter_files import check_tensors

    sites, expected = plan(config, base)
    try:
        check_tensors(file, tensors, expected)
    except ValueError as error:
        raise AdapterError(f"{error} (base {base.name!r})") from error
    return sites


def write_ours(
    folder: Path, config: Any, tensors: dict[str, torch.Tensor], base: BaseSource, source: Path | None
) -> list[str]:
    """Write config.json, the tensors, the code that loads them, tokenizer and generation settings.

    Args:
        folder: an existing, empty folder.
        config: a MixLoraConfig or DoraConfig. It is left as it is.
        tensors: ``{canonical name: tensor}``, which are checked against the base.
        base: the base.
        source: the folder that the adapter comes from; see `write_companions`.

    Returns:
        What the user should know, a line each.

    Raises:
        AdapterError: the tensors do not fit.
    """
    from minilora_hub.remote_code import adapter_files
    from minilora_hub.remote_code.adapted_model import auto_map

    check_against_base(config, tensors, base)
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.base_model_revision = base.name, base.commit
    if config.base_fingerprint == adapter_files.UNKNOWN:  # else it says what the adapter was trained on
        config.base_fingerprint = base.fingerprint
    config.text_config = base.config
    config.architectures = [f"{CLASSES[config.model_type]}ForCausalLM"]
    config.auto_map = auto_map(config)
    config.to_json_file(folder / "config.json")
    adapter_files.write_adapter(folder / SAFETENSORS, tensors)
    code = Path(adapter_files.__file__).parent
    for name in adapter_files.CODE_FILES:
        shutil.copyfile(code / name, folder / name)
    return write_companions(folder, source, base)


def read_ours(source: AdapterFolder, base: BaseSource) -> tuple[Any, dict[str, torch.Tensor], list[Any]]:
    """Read a folder in our format and check it against the base.

    Returns:
        The configuration, ``{canonical name: tensor}``, and the sites.

    Raises:
        AdapterError: the configuration or a tensor is wrong.
    """
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
    except Exception as error:  # a damaged file can make any part of transformers stumble
        raise AdapterError(f"config.json does not load: {' '.join(str(error).split())[:300]}") from error
