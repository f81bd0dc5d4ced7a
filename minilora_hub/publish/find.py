"""Describe, list and download adapters. Torch is not needed, and no code of an adapter is run."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from minilora_hub.adapter_folder.code import code_files, code_hash, release_of
from minilora_hub.adapter_folder.code_references import code_references
from minilora_hub.adapter_folder.folders import count_values, describe_folder, inspect_source
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import METHODS, RESULTS_FILE, Evaluation, Results, Training
from minilora_hub.adapter_folder.writing import whole_folder
from minilora_hub.bases.embedded import HUB_ID
from minilora_hub.bases.resolving import EMBEDDED
from minilora_hub.errors import AdapterError, PublishError
from minilora_hub.formats.settings import check_settings
from minilora_hub.hub.client import fetch
from minilora_hub.hub.errors import FAILURES, explain, patiently

METHOD_TAGS = {"mixdora": "MixDoRA"} | METHODS
"""Tag of a repo on the Hub -> method. A MixDoRA has the tag of a MixLoRA, too, so it comes first."""
SORTS = ("downloads", "likes", "last_modified", "created_at", "trending_score")
LISTED = ["author", "cardData", "createdAt", "downloads", "lastModified", "likes", "private", "tags", "trendingScore"]
LOOKED_AT = 1000
"""Maximum number of models that are listed and filtered here, on a Hub that does not search by tag."""
SHOWN_SETTINGS = (
    "r",
    "lora_alpha",
    "target_modules",
    "target_parameters",
    "use_rslora",
    "use_dora",
    "num_experts",
    "num_experts_per_tok",
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


@dataclass(frozen=True)
class ListedAdapter:
    """An adapter as the Hub lists it."""

    id: str
    method: str | None
    bases: tuple[str, ...] = ()
    downloads: int = 0
    likes: int = 0
    created: str | None = None
    updated: str | None = None
    license: str | None = None
    private: bool = False


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
    """
    folder, commit = Path(repo_or_dir), None
    if not folder.is_dir():
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


def list_adapters(
    base: str | None = None,
    *,
    method: str | None = None,
    sort: str | None = None,
    limit: int = 50,
    token: str | bool | None = None,
) -> list[ListedAdapter]:
    """List adapters on the Hub.

    Args:
        base: the base's id, or ``"embedded"``. Default: any base.
        method: ``"mixlora"`` (which includes those with DoRA), ``"mixdora"``, ``"dora"`` or ``"lora"``. Default: any,
            or without a base: MixLoRA and DoRA.
        sort: the order, the largest or newest first: ``"downloads"``, ``"likes"``, ``"last_modified"``,
            ``"created_at"`` or ``"trending_score"``. Default: downloads.
        limit: how many at most.
        token: to see your private ones, too. Default: the one of ``hf auth login``; False for none.

    Raises:
        PublishError: the Hub cannot be asked, or it does not search by tag and has too many models to look at each.
        ValueError: `method` or `sort` is unknown.
    """
    if method is not None and method not in METHOD_TAGS:
        raise ValueError(f"method={method!r}: must be one of {tuple(METHOD_TAGS)}")
    if sort is not None and sort not in SORTS:
        raise ValueError(f"sort={sort!r}: must be one of {SORTS}")
    base = HUB_ID if base == EMBEDDED else base
    methods: list[str | None] = [method] if method else [None] if base else ["mixlora", "dora"]
    sort = sort or "downloads"
    found: dict[str, Any] = {}
    for tag in methods:
        wanted = ([f"base_model:adapter:{base}"] if base else []) + ([tag] if tag else [])
        try:
            found |= {model.id: model for model in patiently(partial(_search, token, wanted, sort, limit))}
        except FAILURES as error:
            raise PublishError(explain(error, base or "the Hub", "listing adapters")) from None
    models = list(found.values())
    if len(methods) > 1:  # the Hub has sorted the models of each method; those without a value are last
        models.sort(key=lambda model: (getattr(model, sort) is not None, getattr(model, sort) or 0), reverse=True)
    return [_listed(model) for model in models[:limit]]


def _search(token: str | bool | None, wanted: list[str], sort: Any, limit: int) -> list[Any]:
    """Search by tags. If the Hub ignores tags and returns other models, list all models and filter them here.

    Raises:
        PublishError: there are too many of them.
    """
    api = HfApi(token=token)

    def has_tags(model: Any) -> bool:
        return {tag.casefold() for tag in wanted} <= {tag.casefold() for tag in model.tags or []}

    models = list(api.list_models(filter=wanted, sort=sort, limit=limit, expand=LISTED))  # type: ignore[arg-type]
    if all(map(has_tags, models)):
        return models
    models = list(api.list_models(sort=sort, limit=LOOKED_AT + 1, expand=LISTED))  # type: ignore[arg-type]
    if len(models) > LOOKED_AT:
        raise PublishError(
            f"listing adapters: the Hub at {api.endpoint} does not search by tag, and has more than {LOOKED_AT} "
            "models: its adapters cannot be found"
        )
    return list(filter(has_tags, models))[:limit]


def _listed(model: Any) -> ListedAdapter:
    tags = list(model.tags or [])
    prefix = "base_model:adapter:"
    card = model.card_data.to_dict() if model.card_data else {}
    return ListedAdapter(
        id=model.id,
        method=next((name for tag, name in METHOD_TAGS.items() if tag in tags), None),
        bases=tuple(tag.removeprefix(prefix) for tag in tags if tag.startswith(prefix)),
        downloads=model.downloads or 0,
        likes=model.likes or 0,
        created=model.created_at.date().isoformat() if model.created_at else None,
        updated=model.last_modified.date().isoformat() if model.last_modified else None,
        license=card.get("license"),
        private=bool(model.private),
    )


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
