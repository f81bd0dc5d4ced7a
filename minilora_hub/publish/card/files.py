"""Write the documentation of a published folder: results.json, the pictures, and the card."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.results import RESULTS_FILE, Base, Results
from minilora_hub.errors import AdapterError, MissingExtraError

if TYPE_CHECKING:
    from minilora_hub.publish.card.merging import KeptCard

CARD = "README.md"


def write_results(source: Source, folder: Path, base: Base, parameters: int, license: str | None) -> Results:
    """Write results.json: the measured results, or if there are none, the facts that follow from the files.

    Args:
        source: the trained adapter.
        folder: where to write.
        base: the base as it is published, with its fingerprint and number of parameters.
        parameters: of the adapter.
        license: the adapter's licence; default: the one in the results.json of `source`.

    Raises:
        AdapterError: its results.json is damaged, or about another method.
    """
    if (source.folder / RESULTS_FILE).is_file():
        results = Results.load(source.folder)
        if results.method != source.method:
            raise AdapterError(f"{RESULTS_FILE}: method={results.method!r}, but the adapter is {source.method!r}")
        fingerprint, note = results.base.fingerprint or base.fingerprint, results.base.note or base.note
        named = dataclasses.replace(results.base, id=base.id, fingerprint=fingerprint, note=note)
        results = dataclasses.replace(results, base=named)
        if license and license != results.license:
            # The name and the link are of the other licence.
            results = dataclasses.replace(results, license=license, license_name=None, license_link=None)
    else:
        share = parameters / (base.parameters or 1)
        results = Results(source.method, base, parameters=parameters, share=share, license=license)
    results.save(folder)
    return results


def write_card_pictures(source: Path, folder: Path, results: Results, notes: list[str], *, keep: bool) -> None:
    """Draw the card's pictures, or copy those of an earlier build, which another matplotlib would draw differently."""
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


def write_built_card(folder: Path, repo_id: str, revision: str | None, space: str | None, kept: KeptCard) -> str:
    """Write the card and `.eval_results/` into a folder that has everything else, and return the card's text.

    Its links lead to the Hub that is pushed to (``HF_ENDPOINT``).

    Args:
        folder: the folder.
        repo_id: see `render_card`.
        revision: see `render_card`.
        space: see `render_card`; default: the one that an earlier card names.
        kept: what the card keeps of earlier ones.
    """
    from huggingface_hub import constants

    from minilora_hub.publish.card.metadata import eval_results_files
    from minilora_hub.publish.card.render import render_card

    for name, text in eval_results_files(folder).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    space, hub = space or kept.space, constants.ENDPOINT
    card = render_card(folder, repo_id=repo_id, revision=revision, space=space, hub=hub, previous=kept.text)
    card = kept.noted_in(card)
    (folder / CARD).write_text(card, encoding="utf-8", newline="\n")
    return card
