"""Compare results.json, verification.json and the card with the files of the folder."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator
from typing import Any

from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import RESULTS_FILE
from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, Verification
from minilora_hub.documents import strict_json
from minilora_hub.errors import AdapterError
from minilora_hub.publish.card import free_text
from minilora_hub.publish.card.merging import PUSHED
from minilora_hub.publish.card.render import README, numbers_in, render_card, settings_of
from minilora_hub.publish.checks.base import base_of
from minilora_hub.publish.checks.problems import Folder, Problem

RENDER = "render it again: minilora card DIR; put your own text between its free-text marks"
SHOWN = 3


def check_results(folder: Folder) -> Iterator[Problem]:
    """Check that results.json follows its schema and is about this adapter."""
    if RESULTS_FILE not in folder.files:
        return
    results = folder.results
    if isinstance(results, AdapterError):
        yield Problem("results", RESULTS_FILE, str(results), "measure again: minilora eval DIR")
        return
    facts: list[tuple[str, Any, Any]] = [("base.id", results.base.id, base_of(folder)[0])]
    if not folder.peft_layout:
        facts.append(("method", results.method, folder.config.get("model_type")))
        fingerprint = folder.config.get("base_fingerprint")
        if results.base.fingerprint and fingerprint not in (None, "unknown"):
            facts.append(("base.fingerprint", results.base.fingerprint, fingerprint))
    if results.parameters is not None:
        facts.append(("parameters", results.parameters, _parameters(folder)))
    for name, said, found in facts:
        if found is not None and said != found:
            message = f"{name}={said!r}, but the adapter in this folder has {found!r}"
            yield Problem("results", RESULTS_FILE, message, "measure again: minilora eval DIR")


def _parameters(folder: Folder) -> int | None:
    try:
        header = strict_json(folder.data(WEIGHTS) or b"")
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def check_verification(folder: Folder) -> Iterator[Problem]:
    """Check that verification.json follows its schema, and that its hashes are those of the files."""
    if VERIFICATION_FILE not in folder.files:
        return
    rebuild = "build the folder again: minilora push does"
    try:
        recorded = Verification.load(folder.path)
    except AdapterError as error:
        yield Problem("verification", VERIFICATION_FILE, str(error), rebuild)
        return
    for name, digest in recorded.sha256.items():
        path = folder.files.get(name)
        if path is None:
            yield Problem("hash", name, f"is named in {VERIFICATION_FILE}, but is missing", rebuild)
            continue
        if file_sha256(path) != digest:
            yield Problem("hash", name, f"is not the file that {VERIFICATION_FILE} was recorded with", rebuild)
    if WEIGHTS not in recorded.sha256:
        yield Problem("hash", VERIFICATION_FILE, f"sha256 does not name {WEIGHTS}", rebuild)


def check_card(folder: Folder) -> Iterator[Problem]:
    """Check that every number on the card, and its metadata, come from results.json and the configuration."""
    card = folder.text(README)
    if card is None:
        if README in folder.files:
            yield Problem("card", README, "is not UTF-8 text", RENDER)
        return
    yield from _compare_with_rendering(folder, card)
    for name in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", card):
        if "://" not in name and name not in folder.files:
            yield Problem("card", README, f"shows {name}, which is not there", RENDER)


def _compare_with_rendering(folder: Folder, card: str) -> Iterator[Problem]:
    settings = settings_of(card)
    try:
        free_text.sections_of(card)
        rendered = render_card(folder.path, **(settings or {"repo_id": None}), previous=card if settings else None)
    except (AdapterError, ValueError) as error:
        if RESULTS_FILE in folder.files:  # missing and damaged ones are found by other checks
            yield Problem("card", README, f"cannot be compared with {RESULTS_FILE}: {error}", RENDER)
        return
    if settings is None:
        yield from _check_handwritten(card, rendered)
    else:
        yield from _check_generated(card, rendered)


def _check_generated(card: str, rendered: str) -> Iterator[Problem]:
    """Compare a generated card line by line, so that a correct number in the wrong place is found."""
    card = PUSHED.sub("", card, count=1)
    right, there = ([line for kind, _, line in free_text.classify(text) if kind != "free"] for text in (rendered, card))
    changed: list[str] = []
    lost: list[str] = []
    for tag, start, end, first, last in difflib.SequenceMatcher(None, right, there, autojunk=False).get_opcodes():
        if tag != "equal":
            changed += [line.strip()[:100] for line in there[first:last] if line.strip()]
            lost += [line.strip()[:100] for line in right[start:end] if line.strip()]
    numbers = [line for line in changed if re.search(r"\d", line)]
    for line in numbers[:SHOWN]:
        message = f"has a number that is not from {RESULTS_FILE} or the configuration: {line!r}"
        yield Problem("card-numbers", README, message, RENDER)
    words = [line for line in changed if line not in numbers]
    for line in words[:SHOWN]:
        yield Problem("card-edited", README, f"has a line that is not kept: {line!r}", RENDER)
    if lost and not changed:
        yield Problem("card-edited", README, f"lacks {len(lost)} lines, such as {lost[0]!r}", RENDER)


def _check_handwritten(card: str, rendered: str) -> Iterator[Problem]:
    """Check a handwritten card: its fractions and percentages must be in results.json."""
    known = {_value(text) for text in numbers_in(rendered)}
    known |= {round(value * 100, 6) for value in known}
    unknown = [n for n in numbers_in(card) if ("." in n or "%" in n) and _value(n) not in known]
    for text in unknown[:SHOWN]:
        message = f"states {text}, which is not in {RESULTS_FILE}"
        yield Problem("card-numbers", README, message, RENDER)


def _value(text: str) -> float:
    return round(float(text.rstrip("%").replace(",", "")), 6)
