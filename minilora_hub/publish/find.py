"""Describe and download adapters. Torch is not needed, and no code of an adapter is run."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code import code_files, code_hash, release_of
from minilora_hub.adapter_folder.code_references import code_references
from minilora_hub.adapter_folder.folders import count_values, describe_folder, inspect_source
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import METHODS, RESULTS_FILE, Evaluation, Results, Training
from minilora_hub.errors import AdapterError
from minilora_hub.formats.settings import check_settings
from minilora_hub.hub.client import fetch, require_no_revision
from minilora_hub.whole_folders import whole_folder

SHOWN_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "num_experts",
    "num_experts_per_tok",
    "router_scope",
    "routing_strategy",
    "router_top_p",
    "router_temperature",
    "expert_capacity",
    "router_sparse_step",
    "expert_r",
    "expert_alpha",
    # fields of the reference format
    "top_k",
    "top_p",
    "temperature",
    "sparse_step",
    "act_fn",
    "expert_lora",
)
SHOWN_CHECKPOINT = (
    "hidden_size",
    "num_hidden_layers",
    "num_local_experts",
    "num_experts",
    "num_experts_per_tok",
    "dtype",
    "quantization_config",
)


@dataclass(frozen=True)
class AdapterInfo:
    """Facts about an adapter that are known without loading it.

    Attributes:
        name: the folder or the repo.
        revision: the commit; None for a folder.
        method: ``"MixLoRA"``, ``"DoRA"`` or ``"LoRA"``; for a whole model its architecture.
        layout: ``"auto"`` (AutoModel with remote code) or ``"peft"``, which can be published; ``"peft-mixlora"``
            (MixLoRA as a PEFT method), ``"reference"`` (the format of the `mixlora` package) or ``"checkpoint"`` (a
            whole model, such as an export).
        base: the base it names.
        base_revision: the base's commit; None where it names none.
        settings: rank, alpha, experts and the like, as its configuration has them.
        parameters: number of values in its weights; None where they are a pickle, which is not opened.
        bytes: size of all its files.
        files: path -> bytes.
        code: the version of minilora_hub whose code it carries, ``"unknown"`` for other code, None without code.
        license: its licence, if known.
        steps: optimizer steps of its training, if known.
        seconds: duration of its training, if known.
        data: names of the data sets it was trained on.
        evaluation: measured results.
        warnings: references to code outside the adapter's own folder, because of which it would not be loaded.
    """

    name: str
    revision: str | None
    method: str
    layout: str
    base: str | None
    base_revision: str | None
    settings: dict[str, Any]
    parameters: int | None
    bytes: int
    files: dict[str, int]
    code: str | None = None
    license: str | None = None
    steps: int | None = None
    seconds: float | None = None
    data: tuple[str, ...] = ()
    evaluation: tuple[Evaluation, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serializable dictionary."""
        return asdict(self)


def info(
    repo_or_dir: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, progress: bool = True
) -> AdapterInfo:
    """Describe an adapter without loading it.

    Args:
        repo_or_dir: a folder, or an id on the Hub, whose files are fetched into the Hub's cache.
        revision: branch, tag or commit on the Hub. Default: main.
        token: for private repos. Default: the one of ``hf auth login``.
        progress: show bars on stderr while files are fetched.

    Raises:
        AdapterError: it is not there, is not an adapter of a known kind, or has a setting that is not supported.
        ValueError: a revision of a folder is given.
    """
    folder, commit = Path(repo_or_dir), None
    if folder.is_dir():
        require_no_revision(os.fspath(repo_or_dir), revision)
    else:
        folder, commit = fetch(os.fspath(repo_or_dir), revision=revision, token=token, progress=progress)
    found = describe_folder(folder)
    check_settings(found)
    ours = found.dialect in ("minilora", "peft") and (folder / WEIGHTS).is_file()
    weights = sorted(folder.glob("*.safetensors"))
    if not weights and not any(folder.glob("*.bin")):
        raise AdapterError(f"{os.fspath(repo_or_dir)!r}: there are no weights in it")
    shown = SHOWN_CHECKPOINT if found.dialect == "checkpoint" else SHOWN_SETTINGS
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != ".cache"
    }
    code = code_files(folder) if ours else {}
    results = Results.load(folder) if ours and (folder / RESULTS_FILE).is_file() else None
    training = (results and results.training) or Training()
    return AdapterInfo(
        name=os.fspath(repo_or_dir),
        revision=commit,
        method=METHODS.get(found.method, found.method),
        layout=found.layout if ours else found.dialect,
        base=found.base,
        base_revision=found.base_revision,
        settings={name: found.config[name] for name in shown if found.config.get(name) not in (None, False)},
        parameters=sum(map(count_values, [folder / WEIGHTS] if ours else weights)) if weights else None,
        bytes=sum(files.values()),
        files=files,
        code=(release_of(code_hash(code)) or "unknown") if code else None,
        license=results.license if results else None,
        steps=training.steps,
        seconds=training.seconds,
        data=tuple(source.name for source in training.data),
        evaluation=results.evaluation if results else (),
        warnings=code_warnings(folder),
    )


def code_warnings(folder: Path) -> tuple[str, ...]:
    """Return a line for each reference in a folder to code elsewhere; empty if there is none."""
    return tuple(str(reference) for reference in code_references(folder) if reference.problem)


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    out: str | os.PathLike[str] | None = None,
    token: str | None = None,
    progress: bool = True,
) -> Path:
    """Fetch an adapter.

    Args:
        repo_id: its id on the Hub.
        revision: branch, tag or commit. Default: main.
        out: a new folder, written completely or not at all. Default: the Hub's cache.
        token: for private repos. Default: the one of ``hf auth login``.
        progress: show bars on stderr.

    Returns:
        The folder. No code in it was run.

    Raises:
        AdapterError: it is not there, is not an adapter, or `out` exists.
    """
    target = None if out is None else Path(out)
    if target is not None and target.exists():
        raise AdapterError(f"out={str(target)!r}: it exists already; choose another folder, or remove it")
    folder, _ = fetch(repo_id, revision=revision, token=token, progress=progress)
    inspect_source(folder)
    if target is None:
        return folder
    with whole_folder(target) as copy:
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".gitattributes"), dirs_exist_ok=True)
    return target
