"""Write adapter folders in our format; write any folder completely or not at all."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.code import endpoint_files, remote_code_files
from minilora_hub.adapter_folder.companions import write_companions
from minilora_hub.adapter_folder.names import OUR_CONFIG, WEIGHTS
from minilora_hub.adapter_folder.reading import check_against_base
from minilora_hub.adapter_folder.tasks import own_auto_map
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError

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


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `out` when the block succeeds, and removed when it fails.

    Args:
        out: a folder that is empty or does not exist.

    Raises:
        AdapterError: `out` is something else, or the disk is full. Nothing is left of it then.
    """
    out = Path(out)
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as scratch:  # on the file system of `out`
        folder = Path(scratch, "folder")
        try:
            folder.mkdir()
            yield folder
            if out.exists():
                out.rmdir()
            os.replace(folder, out)
        except OSError as error:
            if error.filename is not None:
                raise
            # A full disk is an error of a write, which knows no path.
            raise AdapterError(
                f"out={str(out)!r}: cannot be written ({error.strerror or error}); nothing is left of it"
            ) from error


def require_free(out: str | Path) -> None:
    """Raise an AdapterError unless `out` is an empty folder or does not exist, and can be written."""
    out = Path(out)
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty or does not exist")
    require_writable(out)


def require_writable(folder: Path, argument: str = "out") -> None:
    """Raise an AdapterError unless files can be written into a folder, or into its closest parent that exists.

    It is called before long work whose result goes there.
    """
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise AdapterError(f"{argument}={str(folder)!r}: cannot be written ({error.strerror or error})") from error
