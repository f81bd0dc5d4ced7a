"""Render the README of a published adapter from its results.json and its configuration.

Every number on the card is from one of those two files; what is not known is called unknown. People add to a card in
its free-text sections (`free_text`), which are kept when it is rendered again. Torch is not needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import quote

from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from minilora_hub import formatting
from minilora_hub.adapter_folder.code import code_files, code_hash, release_of
from minilora_hub.adapter_folder.folders import read_json
from minilora_hub.adapter_folder.names import OUR_CONFIG, PEFT_CONFIG
from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import AdapterError
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.facts import PUBLIC_HUB, adapter_rows, summary, training_rows
from minilora_hub.publish.card.metadata import front_matter
from minilora_hub.publish.card.pictures import EXPERT_LOAD, EXPERT_LOAD_BY_TASK, LOSS, wanted_pictures, write_pictures

README = "README.md"
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
    # PEFT's layout: no code comes along, none is needed.
    stock = (folder / PEFT_CONFIG).is_file() and not (folder / OUR_CONFIG).is_file()
    config = read_json(folder / (PEFT_CONFIG if stock else OUR_CONFIG))
    kept = free_text.sections_of(previous) if previous else {}
    code = code_files(folder)
    wanted = wanted_pictures(results)
    name = repo_id or f"./{folder.resolve().name}"
    title = (repo_id or folder.resolve().name).rpartition("/")[2]
    training = results.training
    text = _template().render(
        front_matter=front_matter(results, title, stock),
        settings=_settings(repo_id, revision, space, hub),
        title=formatting.inline(title),
        summary=summary(results, config, hub),
        results=results,
        base=results.base,
        method=results.method,
        stock=stock,
        snippet=_snippet(folder, results, name, revision, stock),
        space_link=f"{hub}/spaces/{space}?adapter={quote(repo_id or '', safe='')}" if space else None,
        local_demo=_local_demo(results, repo_id, title),
        commands=list(dict.fromkeys(row.command for row in results.evaluation if row.command)),
        notes=list(dict.fromkeys(row.note for row in results.evaluation if row.note)),
        few_shot=sorted({row.few_shot for row in results.evaluation if row.few_shot_value is not None}),
        parts=[(row, part) for row in results.evaluation for part in row.parts],
        adapter_rows=adapter_rows(results, config, hub),
        as_mixtral=config.get("routing_strategy") == "top_k",
        training_rows=training_rows(training) if training else [],
        load_picture=EXPERT_LOAD if EXPERT_LOAD in wanted else None,
        router_picture=EXPERT_LOAD_BY_TASK if EXPERT_LOAD_BY_TASK in wanted else None,
        loss_picture=LOSS if LOSS in wanted else None,
        code_files=[(path, hashlib.sha256(file.read_bytes()).hexdigest()) for path, file in code.items()],
        code_origin=_code_origin(code),
        verify_name=formatting.inline(name),
        license_line=_license_line(results),
        free_text=lambda section: free_text.section(section, kept.get(section, "")),
        section=free_text.section,
        other_sections=[(key, value) for key, value in kept.items() if key not in SECTIONS],
    )
    return free_text.squeeze(text)


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
    previous = path.read_text(encoding="utf-8") if path.is_file() else None
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
    """Return the arguments that a card was rendered with, or None if it is not a card of ours."""
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
    # Not autoescape, which is for HTML: every text from outside passes through a filter of `formatting`.
    environment = Environment(  # noqa: S701
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        name: getattr(formatting, name) for name in ("between", "inline", "cell", "code", "block", "number", "short")
    }
    return environment.get_template("card.md.jinja")


def _settings(repo_id: str | None, revision: str | None, space: str | None, hub: str) -> str:
    settings = {"repo_id": repo_id, "revision": revision, "space": space}
    if hub != PUBLIC_HUB:  # without it, the card is as earlier versions wrote it
        settings["hub"] = hub
    return json.dumps(settings).replace(">", "\\u003e")  # so that a revision cannot end the comment


def _snippet(folder: Path, results: Results, name: str, revision: str | None, stock: bool) -> str:
    prompt = results.samples[0].prompt if results.samples else "Hello!"
    at = json.dumps(revision or "main")
    pin = (
        []
        if revision
        else ['# The commit\'s hash instead of "main" pins the code and weights that you have looked at.']
    )
    # A tokenizer needs no code, but transformers would ask, because config.json names classes of the repo.
    trust, tokenizer_trust = ("", "") if stock else (", trust_remote_code=True", ", trust_remote_code=False")
    # For PEFT's format transformers would use a plain `revision` for the base, too.
    pinned = 'adapter_kwargs={"revision": revision}' if stock else f"revision=revision{trust}"
    template = folder / "tokenizer_config.json"
    chat = (folder / "chat_template.jinja").is_file() or (
        template.is_file() and '"chat_template"' in template.read_text(encoding="utf-8", errors="replace")
    )
    text = json.dumps(formatting.visible(prompt), ensure_ascii=False)
    inputs = (
        [
            f'messages = [{{"role": "user", "content": {text}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
        if chat
        else [f'inputs = tokenizer({text}, return_tensors="pt")']
    )
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *pin,
        f"repo, revision = {json.dumps(name)}, {at}",
        f"tokenizer = AutoTokenizer.from_pretrained(repo, revision=revision{tokenizer_trust})",
        f"model = AutoModelForCausalLM.from_pretrained(repo, {pinned})",
        "",
        *inputs,
        "answer = model.generate(**inputs, max_new_tokens=48, do_sample=False)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n".join(lines)


def _local_demo(results: Results, repo_id: str | None, title: str) -> str:
    demo = f"minilora demo {shlex.quote(repo_id or './' + title)} --base {shlex.quote(results.base.id)}"
    return "\n".join(["pip install 'minilora_hub[demo]'", demo])


def _code_origin(code: dict[str, Path]) -> str:
    digest = code_hash(code)
    release = release_of(digest)
    if release is None:
        return f"They are not those of a released minilora_hub (`{digest}`): read them before you trust them."
    known = "" if release == "this version" else f" {release}"
    return f"They are, byte by byte, those that minilora_hub{known} puts into every repo (`{digest}`)."


def _license_line(results: Results) -> str:
    base = f"The base's licence: {formatting.inline(results.base.license)}."
    name = results.license_name or results.license
    if name is None:
        return f"The adapter's licence: {formatting.UNKNOWN}. {base}"
    link = results.license_link if (results.license_link or "").startswith(("https://", "http://")) else None
    shown = f"[{formatting.inline(name)}](<{quote(link, safe=':/?#=&%.-_~')}>)" if link else formatting.inline(name)
    return f"The adapter: {shown}. {base}"
