"""Read and copy the tokenizer, chat template and generation settings that belong to an adapter.

An adapter gives the answers it was trained for only with prompts in the format of its own tokenizer and chat template,
and if generation stops at their end tokens. Every conversion therefore copies these files; missing ones are taken from
the base.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.folders import read_json, refuse_lfs_pointer, write_json
from minilora_hub.adapter_folder.names import COMPANIONS, GENERATION, TEMPLATE, TOKENIZER_FILES, TOKENIZING
from minilora_hub.bases.end_tokens import end_token_ids
from minilora_hub.errors import AdapterError

if TYPE_CHECKING:
    from minilora_hub.bases.skeleton import BaseSource

MORE_TEMPLATES = "additional_chat_templates"


def own_tokenizer(folder: Path, base: Any | None = None) -> Any | None:
    """Load the tokenizer of an adapter. No code of the folder is run.

    Args:
        folder: the adapter's folder.
        base: the base's tokenizer, which is not changed: a copy of it with the adapter's chat template is the tokenizer
            of an adapter that has only a template.

    Returns:
        None where the folder holds neither a tokenizer nor, with `base`, a template.

    Raises:
        AdapterError: its files cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    files = companion_files(folder, TOKENIZING)
    if not any(path.name in TOKENIZER_FILES for path in files):
        if base is None or not (folder / TEMPLATE).is_file():
            return None
        tokenizer = copy.deepcopy(base)
        tokenizer.chat_template = _text(folder / TEMPLATE)
        return tokenizer
    with tempfile.TemporaryDirectory(prefix="minilora-tokenizer-") as scratch:
        # Without config.json: where that names a class of ours, AutoTokenizer would ask to run the repo's code.
        copy_files(files, folder, Path(scratch))
        try:
            return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        except Exception as error:  # a damaged file may fail anywhere in the library
            try:
                return PreTrainedTokenizerFast.from_pretrained(scratch)
            except Exception:
                reason = " ".join(str(error).replace(scratch, folder.name).split())[:300]
                raise AdapterError(f"the tokenizer of adapter {folder.name!r} cannot be loaded: {reason}") from error


def own_generation_settings(folder: Path) -> Any | None:
    """Return the GenerationConfig of an adapter's folder; None where there is none.

    Raises:
        AdapterError: it cannot be read.
    """
    from transformers import GenerationConfig

    if not (folder / GENERATION).is_file():
        return None
    content = read_json(folder / GENERATION)
    ends = content.get("eos_token_id")
    if ends is not None and not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends])):
        raise AdapterError(f"{GENERATION}: eos_token_id={ends!r}: must be a token's number or a list of them")
    try:
        return GenerationConfig.from_dict(content)
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{GENERATION} of adapter {folder.name!r} cannot be read: {error}") from error


def companion_files(folder: Path, names: tuple[str, ...] = COMPANIONS) -> list[Path]:
    """Return the files in a folder that hold an adapter's tokenizer, chat templates and generation settings.

    Args:
        folder: the adapter's folder.
        names: which files; with the chat template, further templates beside it are meant, too.

    Raises:
        AdapterError: one of them is a Git LFS pointer.
    """
    files = [folder / name for name in names if (folder / name).is_file()]
    if TEMPLATE in names:
        files += sorted((folder / MORE_TEMPLATES).glob("*.jinja"))
    for path in files:
        refuse_lfs_pointer(path)
    return files


def common_source(folders: Sequence[Path]) -> Path | None:
    """Return a folder whose tokenizer, templates and generation settings are those of all `folders`.

    Returns:
        None where they differ.
    """
    first, *others = [
        {path.relative_to(folder): path.read_bytes() for path in companion_files(folder)} for folder in folders
    ]
    return folders[0] if all(other == first for other in others) else None


def write_companions(folder: Path, source: Path | None, base: BaseSource | None) -> list[str]:
    """Write an adapter's tokenizer, chat template and generation settings, those of its base where it has none.

    The generation settings that are written end an answer at every token at which this tokenizer's chat template does.

    Args:
        folder: an existing folder.
        source: the adapter's folder. None: there is none, or several that do not agree.
        base: its base. None: what the adapter does not have is not written.

    Returns:
        Notes for the user, one line each.

    Raises:
        AdapterError: one of the adapter's files cannot be read.
    """
    notes, missing = [], []
    own = [] if source is None else companion_files(source)
    names = {path.name for path in own}
    tokenizer = None
    if source is not None and names & {*TOKENIZER_FILES, TEMPLATE}:
        tokenizer = own_tokenizer(source, None if base is None else base.tokenizer)
    if base is not None and not names & {*TOKENIZER_FILES}:
        if base.tokenizer is None:
            notes.append(f"no tokenizer was found with the base {base.name!r}: the adapter has none")
        else:
            base.tokenizer.save_pretrained(folder)
            missing.append("tokenizer" if TEMPLATE in names else "tokenizer and chat template")
            tokenizer = tokenizer or base.tokenizer
    if source is not None:
        copy_files(own, source, folder)
    if base is not None and not (folder / GENERATION).is_file():
        base.generation_settings.save_pretrained(folder)
        missing.append("generation settings")
    if missing:
        why = "the adapters' differ" if source is None else "the adapter has none of its own"
        notes.append(f"{', '.join(missing)}: {why}, the base's are used")
    if tokenizer is not None and (folder / GENERATION).is_file():
        notes += _agree_on_ends(folder, tokenizer)
    return notes


def _agree_on_ends(folder: Path, tokenizer: Any) -> list[str]:
    """Make generation_config.json list every token that ends an answer; return a note where it did not."""
    settings = read_json(folder / GENERATION)
    listed = settings.get("eos_token_id")
    before = [] if listed is None else [listed] if isinstance(listed, int) else listed
    ends = end_token_ids(tokenizer, own_generation_settings(folder))
    if set(ends) == set(before):
        return []
    write_json(folder / GENERATION, settings | {"eos_token_id": ends})
    names = ", ".join(repr(tokenizer.decode([token])) for token in ends)
    return [f"answers end at {names}: {GENERATION} listed {before}, not all of them"]


def copy_files(files: list[Path], source: Path, folder: Path) -> None:
    """Copy files of one folder to the same places in another."""
    for path in files:
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path.name} cannot be read: {error}") from error
