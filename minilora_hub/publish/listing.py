"""List the adapters on the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from huggingface_hub import HfApi

from minilora_hub.adapter_folder.results import METHODS
from minilora_hub.bases.embedded import HUB_ID
from minilora_hub.bases.resolving import EMBEDDED
from minilora_hub.errors import PublishError
from minilora_hub.hub.errors import FAILURES, explain, patiently

METHOD_TAGS = {"mixdora": "MixDoRA"} | METHODS
"""Tag of a repo on the Hub -> method. A MixDoRA has the tag of a MixLoRA, too, so it comes first."""
SORTS = ("downloads", "likes", "last_modified", "created_at", "trending_score")
LISTED = ["author", "cardData", "createdAt", "downloads", "lastModified", "likes", "private", "tags", "trendingScore"]
LOOKED_AT = 1000
"""Maximum number of models that are listed and filtered here, on a Hub that does not search by tag."""


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
