"""Write adapter folders in our format."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.code import endpoint_files, remote_code_files
from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.names import OUR_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.reading import check_against_base
from minilora_hub.adapter_folder.tasks import own_auto_map
from minilora_hub.bases.skeleton import BaseSource

if TYPE_CHECKING:
    import torch


def write_ours(
    folder: Path, config: Any, tensors: dict[str, torch.Tensor], base: BaseSource, source: Path | None
) -> list[str]:
    """Write config.json, the tensors, the code that loads them, tokenizer and generation settings.

    Args:
        folder: an existing, empty folder.
        config: a MixLoraConfig or DoraConfig, which is not changed.
        tensors: ``{canonical name: tensor}``, which are checked against the base.
        base: the base.
        source: the folder that the adapter comes from; see `write_companions`.

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: the tensors do not fit.
    """
    from minilora_hub.remote_code import adapter_files

    check_against_base(config, tensors, base)
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.base_model_revision = base.name, base.commit
    if config.base_fingerprint == adapter_files.UNKNOWN:  # otherwise it is the fingerprint of the base in training
        config.base_fingerprint = base.fingerprint
    config.text_config = base.config
    config.auto_map = own_auto_map(config.model_type)
    config.architectures = [config.auto_map["AutoModelForCausalLM"].rpartition(".")[2]]
    config.to_json_file(folder / OUR_CONFIG)
    adapter_files.write_adapter(folder / WEIGHTS, tensors)
    write_code(folder)
    return write_companions(folder, source, base)


def write_code(folder: Path) -> None:
    """Copy this version's remote code into a folder."""
    for name, path in remote_code_files().items():
        shutil.copyfile(path, folder / name)


def write_endpoint(folder: Path, peft_layout: bool) -> None:
    """Copy the files that make a repo an Inference Endpoint into a folder; see `endpoint_files`."""
    for name, path in endpoint_files(peft_layout).items():
        shutil.copyfile(path, folder / name)
