"""README front matter: what the Hub checks in it and the tags it derives from it."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from .store import Commit, Repo

FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
REPO_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
LISTS_OF_TEXT = ("tags", "base_model", "datasets", "language", "new_version")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
PLAIN_TEXT = ("license", "library_name", "pipeline_tag", "license_name", "license_link")


def as_list(value: Any) -> list[Any]:
    """Return a card field that may be absent, one value or several as a list."""
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def read_card(text: str) -> dict[str, Any] | None:
    """Return the front matter of a README, None without one; raises yaml.YAMLError where it does not parse."""
    found = FRONT_MATTER.match(text)
    return yaml.safe_load(found.group(1)) if found else None


def check_card(text: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Return the errors and the warnings the Hub has for a README of a repository of this kind."""
    try:
        card = read_card(text)
    except yaml.YAMLError as error:
        return [f"the front matter is not YAML: {error}"], []
    if not card:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(card, dict):
        return [f"the front matter must be a mapping, got {type(card).__name__}"], []
    errors = [f'"{key}" must be a string' for key in PLAIN_TEXT if not isinstance(card.get(key, ""), str)]
    for key in LISTS_OF_TEXT:
        errors += [
            f'"{key}" must hold strings, got {value!r}'
            for value in as_list(card.get(key))
            if value.__class__ is not str
        ]
    for key in ("base_model", "datasets"):
        values = [value for value in as_list(card.get(key)) if isinstance(value, str)]
        errors += [
            f'"{key}" with value "{value}" is not a repository id' for value in values if not REPO_ID.fullmatch(value)
        ]
    if card.get("base_model_relation", "adapter") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}, got {card["base_model_relation"]!r}')
    return errors + (check_space(card) if kind == "space" else []), []


def check_space(card: dict[str, Any]) -> list[str]:
    """Return what is wrong with the configuration of a Space."""
    errors = [f'"{key}" is required' for key in ("sdk", "emoji", "colorFrom", "colorTo") if key not in card]
    errors += [
        f'"{key}" must be one of {COLOURS}' for key in ("colorFrom", "colorTo") if card.get(key, "red") not in COLOURS
    ]
    texts = ("title", "sdk_version", "python_version", "app_file", "short_description", "suggested_hardware")
    errors += [f'"{key}" must be a string' for key in texts if not isinstance(card.get(key, ""), str)]
    if len(str(card.get("short_description", ""))) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    for key in ("models", "preload_from_hub"):
        values = card.get(key, [])
        if not isinstance(values, list) or not all(REPO_ID.fullmatch(str(value).split(" ")[0]) for value in values):
            errors.append(f'"{key}" must be a list of repository ids')
    return errors


def card_of(commit: Commit) -> dict[str, Any]:
    """Return the card data at a commit, empty where there is none."""
    readme = commit.blobs.get("README.md")
    try:
        card = read_card(readme.data.decode()) if readme else None
    except yaml.YAMLError:
        return {}
    return card if isinstance(card, dict) else {}


def config_of(commit: Commit) -> dict[str, Any]:
    """Return config.json at a commit, empty where there is none."""
    try:
        config = json.loads(commit.blobs["config.json"].data)
    except (KeyError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def relation(card: dict[str, Any], commit: Commit) -> str:
    """Return how a model relates to its base: what the card says, else what the files suggest."""
    if "base_model_relation" in card:
        return str(card["base_model_relation"])
    if len(as_list(card.get("base_model"))) > 1:
        return "merge"
    adapter = "adapter_config.json" in commit.blobs or card.get("library_name") in {"peft", "adapter-transformers"}
    return "adapter" if adapter else "finetune"


def tags_of(repo: Repo, commit: Commit) -> list[str]:
    """Return the tags a search matches, in the Hub's vocabulary."""
    card, config = card_of(commit), config_of(commit)
    tags = [card.get("library_name"), repo.sdk, card.get("pipeline_tag")]
    tags += ["safetensors"] if any(path.endswith(".safetensors") for path in commit.blobs) else []
    tags += [config.get("model_type"), "custom_code" if config.get("auto_map") else None]
    tags += as_list(card.get("tags"))
    tags += [code if repo.type == "model" else f"language:{code}" for code in as_list(card.get("language"))]
    tags += [f"dataset:{name}" for name in as_list(card.get("datasets"))]
    for base in as_list(card.get("base_model")):
        tags += [f"base_model:{base}", f"base_model:{relation(card, commit)}:{base}"]
    tags += [f"license:{card['license']}"] if "license" in card else []
    tags += [f"task_categories:{name}" for name in as_list(card.get("task_categories"))]
    return list(dict.fromkeys(str(tag) for tag in [*tags, "region:us"] if tag))
