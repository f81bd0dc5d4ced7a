"""Render the README of a published adapter from its results.json and its configuration.

Every number on the card is from one of those two files; a missing value is shown as "unknown". Authors write in the
card's free-text sections (`free_text`), which are kept when it is rendered again. Torch is not needed.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from minilora_hub import formatting
from minilora_hub.adapter_folder.code import HANDLER, code_files, code_hash, release_of
from minilora_hub.adapter_folder.folders import experts_text, only_ours, read_json
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG
from minilora_hub.adapter_folder.results import METHODS, Base, Results
from minilora_hub.adapter_folder.tasks import CAUSAL_LM, PIPELINES, auto_class_of, inputs_of, pipeline_tag
from minilora_hub.errors import AdapterError
from minilora_hub.hub.client import PUBLIC_HUB, REPO_ID
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.metadata import front_matter
from minilora_hub.publish.card.pictures import EXPERT_LOAD, EXPERT_LOAD_BY_TASK, LOSS, wanted_pictures, write_pictures
from minilora_hub.publish.card.serving import serving

README = "README.md"
PAPERS = {"mixlora": "2404.15159", "dora": "2402.09353", "lora": "2106.09685"}
SECTIONS = ("intro", "results", "limits")
SETTINGS = re.compile(r"^<!-- minilora:card (\{.*\}) -->$", re.MULTILINE)
NUMBER = re.compile(r"(?<![\w.,/-])-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?(?![\w/]|[.-]\w)")


def render_card(
    folder: Path,
    *,
    repo_id: str | None,
    revision: str | None = None,
    space: str | None = None,
    hub: str | None = None,
    previous: str | None = None,
) -> str:
    """Render the card of an adapter folder.

    Args:
        folder: with results.json and config.json (or PEFT's adapter_config.json), and the code files if it has any.
        repo_id: where it is published; None for the folder's name.
        revision: the tag or commit that the load snippet pins. None: ``"main"``, with a comment on pinning.
        space: id of the Space that "try it" opens; None for the local command.
        hub: address of the Hub that links lead to. None: the public one.
        previous: an earlier card, whose free-text sections are kept.

    Returns:
        The text of README.md. The same folder and arguments give the same text.

    Raises:
        AdapterError: results.json or the configuration is missing or damaged, or a free-text section is not closed.
        ValueError: `repo_id` or `space` is not a valid id.
    """
    if repo_id is not None:
        validate_repo_id(repo_id)
    require_space(space)
    hub = hub or PUBLIC_HUB
    results = Results.load(folder)
    # PEFT's layout needs no code.
    stock = (folder / PEFT_CONFIG).is_file() and not (folder / OUR_CONFIG).is_file()
    config = read_json(folder / (PEFT_CONFIG if stock else OUR_CONFIG))
    kept = free_text.sections_of(previous) if previous else {}
    code = code_files(folder)
    wanted = wanted_pictures(results)
    name = repo_id or f"./{folder.resolve().name}"
    title = (repo_id or folder.resolve().name).rpartition("/")[2]
    prompt = results.samples[0].prompt if results.samples else "Hello!"
    digest = code_hash(code)
    libraries = results.training.libraries if results.training else {}
    link = results.license_link if (results.license_link or "").startswith(("https://", "http://")) else None
    auto_class = CAUSAL_LM if stock else auto_class_of(config)
    classifying = [name for name, tag in PIPELINES.items() if tag.endswith("-classification") and "Zero" not in name]
    tag = pipeline_tag({} if stock else config)
    text = _template().render(
        front_matter=front_matter(results, title, stock, tag, bool(config.get("use_dora"))),
        auto_class=auto_class,
        inputs="text" if stock else inputs_of(config),
        generates=auto_class == CAUSAL_LM,
        classifying=classifying,
        settings=_settings(repo_id, revision, space, hub),
        title=title,
        name=name,
        revision=revision,
        method_name=METHODS[results.method],
        paper=PAPERS[results.method],
        config=config,
        top_p=config.get("routing_strategy") == "top_p",
        base_link=_base_link(results.base, hub),
        results=results,
        base=results.base,
        method=results.method,
        stock=stock,
        has_chat_template=_has_chat_template(folder),
        prompt=json.dumps(formatting.visible(prompt), ensure_ascii=False),
        space_link=f"{hub}/spaces/{space}?adapter={quote(repo_id or '', safe='')}" if space else None,
        serving=serving(results.method, config, results.base.id, name, repo_id, stock),
        commands=list(dict.fromkeys(row.command for row in results.evaluation if row.command)),
        notes=list(dict.fromkeys(row.note for row in results.evaluation if row.note)),
        few_shot=sorted({row.few_shot for row in results.evaluation if row.few_shot_value is not None}),
        parts_by="label" if auto_class in classifying else "difficulty",
        parts=[(row, part) for row in results.evaluation for part in row.parts],
        modules=_modules(config),
        as_mixtral=config.get("routing_strategy") == "top_k" and only_ours(config) is None,
        experts=experts_text(config.get("num_experts")),
        libraries=", ".join(f"{name} {version}" for name, version in libraries.items()) or None,
        load_picture=EXPERT_LOAD if EXPERT_LOAD in wanted else None,
        router_picture=EXPERT_LOAD_BY_TASK if EXPERT_LOAD_BY_TASK in wanted else None,
        loss_picture=LOSS if LOSS in wanted else None,
        code_files=[(path, file_sha256(file)) for path, file in code.items()],
        code_digest=digest,
        code_name="code files" if HANDLER in code else "Python files",
        endpoint=HANDLER in code,
        release=release_of(digest),
        license=results.license_name or results.license,
        license_link=quote(link, safe=":/?#=&%.-_~") if link else None,
        free_text=lambda section: free_text.section(section, kept.get(section, "")),
        section=free_text.section,
        other_sections=[(key, value) for key, value in kept.items() if key not in SECTIONS],
    )
    return free_text.squeeze(text)


def _modules(config: Mapping[str, Any]) -> str | None:
    """Return what is adapted: the names of modules, and of parameters where there are any."""
    targets, parameters = config.get("target_modules"), config.get("target_parameters") or []
    named = targets if isinstance(targets, list) else [targets]
    return targets if targets is None else ", ".join(map(str, [*named, *parameters]))


def write_card(
    folder: Path,
    *,
    repo_id: str | None,
    revision: str | None = None,
    space: str | None = None,
    hub: str | None = None,
) -> Path:
    """Write README.md and its pictures into a folder; the free text of the folder's README is kept.

    Raises:
        AdapterError: as `render_card`; or README.md was not written by minilora, and would be lost.
        MissingExtraError: there are numbers for a picture, and matplotlib is not installed.
    """
    path = folder / README
    previous = free_text.read_card(folder)
    if previous is not None and not SETTINGS.search(previous):
        raise AdapterError(
            f"{folder.name}: README.md was not written by minilora, and would be lost: delete it, or keep your text by "
            f"putting it between `<!-- minilora:free-text intro -->` and `{free_text.CLOSE}` in a card that "
            "`minilora card` has written"
        )
    text = render_card(folder, repo_id=repo_id, revision=revision, space=space, hub=hub, previous=previous)
    write_pictures(Results.load(folder), folder)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def require_space(space: str | None) -> None:
    """Raise ValueError unless this can be the id of a Space, or is None."""
    if space is not None:
        if space.count("/") != 1:
            raise ValueError(f"space={space!r}: must be the id of a Space, owner/name")
        validate_repo_id(space)


def settings_of(card: str) -> dict[str, str | None] | None:
    """Return the arguments that a card was rendered with, or None if minilora did not write it."""
    found = SETTINGS.search(card)
    try:
        settings = json.loads(found[1]) if found else None
    except ValueError:
        return None
    if not isinstance(settings, dict) or settings.keys() - {"hub"} != {"repo_id", "revision", "space"}:
        return None
    return settings if all(value is None or isinstance(value, str) for value in settings.values()) else None


def numbers_in(card: str) -> list[str]:
    """Return every number on a card, as written, outside free text, code blocks, links and ids."""
    rest = "\n".join(line for kind, _, line in free_text.classify(card) if kind == "text")
    rest = re.sub(r"<!--.*?-->|`[^`\n]*`|\]\([^)\s]*\)|https?://\S+", " ", rest, flags=re.DOTALL)
    return NUMBER.findall(rest)


@cache
def _template() -> Template:
    # autoescape is for HTML; here every untrusted text passes through a Markdown filter of `formatting`.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    names = ("between", "block", "cell", "code", "duration", "inline", "number", "percent", "short")
    environment.filters |= {name: getattr(formatting, name) for name in names}
    environment.filters |= {"python": json.dumps, "shell": shlex.quote}
    return environment.get_template("card.md.jinja")


def _settings(repo_id: str | None, revision: str | None, space: str | None, hub: str) -> str:
    settings = {"repo_id": repo_id, "revision": revision, "space": space}
    if hub != PUBLIC_HUB:  # without it, the card is as earlier versions wrote it
        settings["hub"] = hub
    return json.dumps(settings).replace(">", "\\u003e")  # so that a revision cannot end the comment


def _base_link(base: Base, hub: str) -> str:
    """Return the base's id, as a link to its page where it is an id on the Hub."""
    if not REPO_ID.fullmatch(base.id):
        return formatting.code(base.id)
    tree = f"/tree/{base.revision}" if base.revision and REPO_ID.fullmatch(base.revision) else ""
    return f"[{formatting.inline(base.id)}]({hub}/{base.id}{tree})"


def _has_chat_template(folder: Path) -> bool:
    config = folder / "tokenizer_config.json"
    inside = config.is_file() and '"chat_template"' in config.read_text(encoding="utf-8", errors="replace")
    return inside or (folder / "chat_template.jinja").is_file()
