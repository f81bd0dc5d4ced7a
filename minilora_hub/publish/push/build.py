"""Build the folder that is published from a trained folder.

    config.json with auto_map    adapter_model.safetensors    this version's remote code
    tokenizer, chat template     generation_config.json       README.md  results.json  verification.json  pictures
    peft/                        the same adapter in PEFT's format, where PEFT can read it (DoRA)
    handler.py  requirements.txt where the repo is to be an Inference Endpoint

The root of such a repo never has an `adapter_config.json`: AutoModel would take the base's config and not see the class
of the adapter. Plain LoRA, and `layout="peft"`, are published in PEFT's own layout instead, without code.

The reference logits are recorded with the installed classes of minilora_hub, so no code of the folder is run. A
recording that is still valid is reused, and then the base is not loaded. The folder is written whole or not at all.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code_references import require_no_other_code
from minilora_hub.adapter_folder.companions import companion_files, copy_files
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import Layout, read_source
from minilora_hub.adapter_folder.hashes import file_sha256, recorded_before
from minilora_hub.adapter_folder.names import GENERATION, OUR_CONFIG, PROCESSING, TEMPLATE, TOKENIZING, WEIGHTS
from minilora_hub.adapter_folder.results import Base
from minilora_hub.adapter_folder.tasks import CAUSAL_LM, is_own_auto_map, own_auto_map
from minilora_hub.adapter_folder.verification import VERIFICATION_FILE, Verification, is_hashed
from minilora_hub.adapter_folder.writing import write_code, write_endpoint
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import PeftTargets, copy_peft_weights, write_peft_config
from minilora_hub.publish.card.files import write_built_card, write_card_pictures, write_results
from minilora_hub.publish.card.free_text import read_card
from minilora_hub.publish.card.merging import merge_cards
from minilora_hub.recording.document import Recording, recording_key
from minilora_hub.recording.logits import TOLERANCES, libraries
from minilora_hub.recording.recorded_base import RecordedBase, find_recorded_base, recorded_revision
from minilora_hub.recording.reference import (
    Obtained,
    model_class,
    obtain_recording,
    processor_folder,
    tokenizer_folder,
    write_dora_for_peft,
)
from minilora_hub.whole_folders import whole_folder

PEFT_FOLDER = "peft"
EMBEDDED_NOTE = "trained on the Q4_1 rounding of these weights that minilora_hub calls `embedded`"


@dataclass(frozen=True)
class PublishedFile:
    """A file as it is published: its path in the repo, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Recorded:
    """Whether the reference logits were reused (so that the base was not loaded), and the reason."""

    reused: bool
    reason: str


@dataclass(frozen=True)
class Built:
    """Result of `build`.

    Attributes:
        folder: the folder, as it is published.
        layout: ``"auto"`` (AutoModel with remote code) or ``"peft"``.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        base_id: the base's id on the Hub, as the configuration names it.
        base_elsewhere: where the base was loaded from, where that is not `base_id` on the Hub.
        card: the text of its README.md.
        files: every file in it, sorted by path.
        recorded: where the logits in verification.json come from.
        notes: notes for the author, a line each.
    """

    folder: Path
    layout: Layout
    method: str
    base_id: str
    base_elsewhere: str | None
    card: str
    files: tuple[PublishedFile, ...]
    recorded: Recorded
    notes: tuple[str, ...] = ()


def build(
    source: str | Path,
    out: str | Path,
    *,
    repo_id: str,
    revision: str | None = None,
    layout: Layout = "auto",
    base_id: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    space: str | None = None,
    endpoint: bool = False,
    published_card: str | None = None,
    token: str | None = None,
    progress: bool = False,
) -> Built:
    """Build the folder that is published.

    Args:
        source: folder written by ``save_pretrained``, with results.json if something was measured.
        out: the folder to write; it must not exist yet, or be empty.
        repo_id: the repo that the card names.
        revision: the tag or commit that the card's snippet pins.
        layout: ``"peft"`` publishes a DoRA in PEFT's layout. A plain LoRA always uses PEFT's layout.
        base_id: the base's id on the Hub, where the adapter names a folder.
        license: the adapter's licence; default: the one in results.json.
        base_model: where to load the base from: ``"embedded"``, a folder or an id. Default: what the adapter names.
        space: id of the Space that the card's "try it" opens. Default: the one that the earlier card names.
        endpoint: add the files of an Inference Endpoint.
        published_card: the card in the repo; its free text is kept, see `merge_cards`.
        token: for a private or gated base.
        progress: show bars while the base is fetched.

    Raises:
        AdapterError: the folder is damaged, incomplete, or cannot be published like this; or a section of the card was
            written on the Hub as well.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    trained = _read_adapter(source, layout)
    layout = "peft" if trained.layout == "peft" else layout
    if endpoint and trained.auto_class != CAUSAL_LM:
        raise AdapterError(f"endpoint: its handler generates text, and this adapter is for {trained.auto_class}")
    before = recorded_before(trained.folder)
    card_notes: list[str] = []
    kept = merge_cards(read_card(trained.folder), published_card, card_notes)
    base = find_recorded_base(trained, base_id, base_model, token, progress)
    with whole_folder(out) as folder:
        found = obtain_recording(trained, base, before)
        recording = found.recording
        notes = [note for note in (found.note, recording.note) if note]
        published_base = _published_base(trained, base, recording)
        _copy_model(trained, folder, layout, base)
        notes += _write_adapter(trained, folder, layout, published_base, recording)
        if endpoint:
            write_endpoint(folder, peft_layout=layout == "peft")
        results = write_results(trained, folder, published_base, recording.parameters, license)
        write_card_pictures(trained.folder, folder, results, notes, keep=before is not None)
        card = write_built_card(folder, repo_id, revision, space, kept)
        _require_unchanged(trained, base, recording)
        _write_verification(folder, found, before)
    return Built(
        folder=Path(out),
        layout=layout,
        method=trained.method,
        base_id=base.id,
        base_elsewhere=base.elsewhere,
        card=card,
        files=list_files(Path(out)),
        recorded=Recorded(found.reused, found.reason),
        notes=tuple(dict.fromkeys([*notes, *card_notes])),
    )


def list_files(folder: Path) -> tuple[PublishedFile, ...]:
    """List every file under a folder with its size and hash, sorted by path."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return tuple(PublishedFile(name, paths[name].stat().st_size, file_sha256(paths[name])) for name in sorted(paths))


def _read_adapter(folder: str | Path, layout: str) -> Source:
    if layout not in ("auto", "peft"):
        raise ValueError(f"layout={layout!r}: must be 'auto' or 'peft'")
    source = read_source(folder)
    require_no_other_code(source.folder)
    if layout == "peft" and source.method == "mixlora":
        raise AdapterError("layout='peft': PEFT has no MixLoRA; publish it with the layout 'auto'")
    return source


def _published_base(source: Source, base: RecordedBase, recording: Recording) -> Base:
    """Return the base as results.json names it."""
    fingerprint = recording.key["base"]
    note = EMBEDDED_NOTE if base.found.embedded else None
    revision = recorded_revision(source, base, fingerprint)
    return Base(base.id, revision, fingerprint, parameters=recording.base_parameters, note=note)


def _copy_model(source: Source, folder: Path, layout: Layout, base: RecordedBase) -> None:
    """Copy weights, tokenizer, processor and generation settings; where the adapter has none, the base's."""
    if source.layout == "peft":
        copy_peft_weights(source.folder, folder)
        write_peft_config(folder, source.config, base.id, base.revision)
    elif layout == "auto":
        shutil.copyfile(source.folder / WEIGHTS, folder / WEIGHTS)
    tokenizer, processor = tokenizer_folder(source, base.found), processor_folder(source, base.found)
    copy_files(companion_files(tokenizer, TOKENIZING), tokenizer, folder)
    copy_files(companion_files(processor, PROCESSING), processor, folder)
    copy_files(companion_files(base.found.path, (GENERATION,)), base.found.path, folder)
    # An adapter may have these without a tokenizer of its own.
    copy_files(companion_files(source.folder, (GENERATION, TEMPLATE)), source.folder, folder)


def _write_adapter(source: Source, folder: Path, layout: Layout, base: Base, recording: Recording) -> list[str]:
    """Write the configuration and the code of the copied weights, and the folder for PEFT.

    Returns:
        Notes for the author, a line each.
    """
    notes = []
    if source.method == "dora" and source.layout == "auto":
        problem = recording.peft_problem
        if problem and layout == "peft":
            raise AdapterError(f"layout='peft': {problem}; publish it with the layout 'auto'")
        if problem:
            notes.append(f"no {PEFT_FOLDER}/ folder: {problem}")
        else:
            peft = folder if layout == "peft" else folder / PEFT_FOLDER
            targets = PeftTargets(recording.peft_targets, recording.layers_path or "", recording.peft_fan_in_fan_out)
            write_dora_for_peft(source, peft, targets, base.id, base.revision)
    if layout == "auto":
        config = json.dumps(_published_config(source, base), indent=2, sort_keys=True)
        (folder / OUR_CONFIG).write_text(config + "\n", encoding="utf-8", newline="\n")
        write_code(folder)
    return notes


def _published_config(source: Source, base: Base) -> dict[str, Any]:
    """Return the published configuration: the source's, with the base's Hub id and `auto_map`."""
    given = source.config.get("auto_map")
    own = given if is_own_auto_map(given, source.method) else own_auto_map(source.method)
    return source.config | {
        "architectures": [model_class(source).__name__],
        "auto_map": own,
        "base_model_name_or_path": base.id,
        "base_model_revision": base.revision,
    }


def _require_unchanged(source: Source, base: RecordedBase, recording: Recording) -> None:
    """Refuse weights or a configuration that changed after they were recorded."""
    key = recording_key(source, base.found, recording.key["base"])
    for name in ("weights", "configuration"):
        if key[name] != recording.key[name]:
            raise AdapterError(
                f"{source.name!r}: its {name} changed while it was published: wait until it is complete, and push again"
            )


def _write_verification(folder: Path, found: Obtained, before: Verification | None) -> None:
    """Write verification.json, or keep the recording of an earlier build if it is still valid."""
    recording = found.recording
    sha256 = {file.path: file.sha256 for file in list_files(folder) if is_hashed(file.path)}
    limit = TOLERANCES[recording.dtype]
    if before is not None and found.gap is not None:
        if not found.gap <= limit:
            raise AdapterError(
                f"the model's logits differ by {found.gap:.2g} from those in {VERIFICATION_FILE} (tolerance "
                f"{limit:g}): it or this installation is damaged; delete {VERIFICATION_FILE} to record again"
            )
        same_files = before.sha256 == sha256 and before.prompts == recording.prompts
        if same_files and before.libraries == libraries() and before.tolerance == limit:
            before.save(folder)
            return
    Verification(
        prompts=recording.prompts,
        top_tokens=recording.top_tokens,
        top_logits=recording.top_logits,
        tolerance=limit,
        sha256=sha256,
        base_fingerprint=recording.key["base"],
        dtype=recording.dtype,
        libraries=libraries(),
    ).save(folder)
