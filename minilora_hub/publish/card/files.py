"""The files of a published folder that are for people: results.json, the pictures, and the card."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.results import RESULTS_FILE, Base, Results
from minilora_hub.errors import AdapterError, MissingExtraError

CARD = "README.md"
EMBEDDED_NOTE = "trained on the Q4_1 rounding of these weights that minilora_hub calls `embedded`"


@dataclass(frozen=True)
class Measured:
    """What building found out: the base as it is published and as it was loaded, and the adapter's size."""

    base_id: str
    base_revision: str | None
    fingerprint: str
    base_parameters: int
    embedded: bool
    parameters: int


def previous_card(folder: Path) -> str | None:
    """Return the README.md of a folder, None where there is none."""
    card = folder / CARD
    if not card.is_file():
        return None
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(f"{CARD} is not UTF-8 ({error}): repair or delete it") from error


def write_results(source: Source, folder: Path, measured: Measured, license: str | None) -> Results:
    """Write results.json: what was measured, or where nothing was, what the files themselves tell."""
    if (source.folder / RESULTS_FILE).is_file():
        results = Results.load(source.folder)
        base = dataclasses.replace(results.base, id=measured.base_id)
        base = base if base.fingerprint else dataclasses.replace(base, fingerprint=measured.fingerprint)
    else:
        base = Base(measured.base_id, measured.base_revision, measured.fingerprint, parameters=measured.base_parameters)
        share = measured.parameters / measured.base_parameters
        results = Results(source.method, base, parameters=measured.parameters, share=share)
    if results.method != source.method:
        raise AdapterError(f"{RESULTS_FILE}: method={results.method!r}, but the adapter is {source.method!r}")
    if measured.embedded and base.note is None:
        base = dataclasses.replace(base, note=EMBEDDED_NOTE)
    results = dataclasses.replace(results, base=base, license=license or results.license)
    results.save(folder)
    return results


def write_card_pictures(source: Path, folder: Path, results: Results, notes: list[str], *, keep: bool) -> None:
    """Draw the card's pictures, or keep those of an earlier build, which another matplotlib would draw differently."""
    from minilora_hub.publish.card.pictures import wanted_pictures, write_pictures

    wanted = wanted_pictures(results)
    if keep and all((source / name).is_file() for name in wanted):
        for name in wanted:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        return
    try:
        write_pictures(results, folder)
    except MissingExtraError as error:
        notes.append(f"no pictures on the card: {error}")


def card_to_keep(own: str | None, published: str | None, notes: list[str]) -> str | None:
    """Return the earlier card whose free text and Space are kept: the folder's own, or else the published one."""
    from minilora_hub.publish.card.render import settings_of

    if own and settings_of(own) is None:
        notes.append(f"the folder's own {CARD} was not written by minilora: a new one is published in its place")
        own = None
    elif not own and published and settings_of(published) is None:
        notes.append(f"the {CARD} in the repo was not written by minilora: a new one takes its place")
    kept = own or published
    return kept if kept and settings_of(kept) else None


def write_card(folder: Path, repo_id: str, revision: str | None, space: str | None, previous: str | None) -> str:
    """Write the card and what goes with it, and return it. It tells of the files that are there already.

    Its links lead to the Hub that is pushed to (``HF_ENDPOINT``).

    Args:
        folder: the folder, with everything else in it.
        repo_id: see `render_card`.
        revision: see `render_card`.
        space: see `render_card`; default: the one that `previous` names.
        previous: an earlier card of ours, whose free text is kept.
    """
    from huggingface_hub import constants

    from minilora_hub.publish.card.metadata import eval_results_files
    from minilora_hub.publish.card.render import render_card, settings_of

    before = settings_of(previous) if previous else None
    for name, text in eval_results_files(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    space = space or (before["space"] if before else None)
    card = render_card(
        folder, repo_id=repo_id, revision=revision, space=space, hub=constants.ENDPOINT, previous=previous
    )
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    return card
