"""From a trained folder to exactly the folder that is published.

    config.json with auto_map    adapter_model.safetensors    the island's files of this version
    tokenizer, chat template     generation_config.json       README.md  results.json  verification.json  pictures
    peft/                        the same adapter in PEFT's format, where PEFT can read it (DoRA)

There is never an `adapter_config.json` at the root of such a repo: AutoModel would then take the base's config and
never see the class. Plain LoRA, and `layout="peft"`, are published in PEFT's own layout instead, without code.

What the adapter computes on its base is recorded with our installed classes, so nothing of the folder is run; a
recording that still holds is used again, and then the base is not even loaded. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.code_references import require_no_other_code
from minilora_hub.adapter_folder.companions import companion_files, copy_files
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import Layout, read_source
from minilora_hub.adapter_folder.hashes import Hashes
from minilora_hub.adapter_folder.names import GENERATION, OUR_CONFIG, TEMPLATE, TOKENIZING, WEIGHTS
from minilora_hub.adapter_folder.recorded import PEFT_FOLDER, recorded_before, require_recorded
from minilora_hub.adapter_folder.results import VERIFICATION_FILE, Verification
from minilora_hub.adapter_folder.writing import require_free, whole_folder, write_code
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import PeftTargets, copy_peft_weights, write_peft_config
from minilora_hub.publish.card.files import (
    CARD,
    Measured,
    card_to_keep,
    previous_card,
    write_card,
    write_card_pictures,
    write_results,
)
from minilora_hub.recording.bases_of_record import BaseOfRecord, find_base_of_record, revision_of_record
from minilora_hub.recording.inputs import tokenizer_folder
from minilora_hub.recording.logits import TOLERANCES, libraries
from minilora_hub.recording.reference import model_class, shapes_of_recording, write_dora_for_peft
from minilora_hub.recording.reuse import Obtained, obtain_recording
from minilora_hub.recording.shapes import Shapes

NOT_HASHED = (CARD, ".eval_results/", VERIFICATION_FILE)
"""People edit the card on the Hub's page, which has measured results beside it; a file cannot hold its own hash."""


@dataclass(frozen=True)
class PublishedFile:
    """A file as it is published: its path in the repo, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Recorded:
    """Where the recorded logits come from: whether they were there before, and why they were used again or made."""

    reused: bool
    reason: str


@dataclass(frozen=True)
class Built:
    """What `build` made.

    Attributes:
        folder: the folder, as it is published.
        layout: ``"auto"`` (AutoModel with our code) or ``"peft"``.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        base_id: the base's id on the Hub, as the configuration names it.
        base_elsewhere: where the base was loaded from, where that is not `base_id` on the Hub.
        card: the text of its README.md.
        files: every file in it, sorted by path.
        hashes: of these files, for whoever needs one again.
        recorded: whether the logits in verification.json were recorded now, or before; and why.
        notes: what the author should know, a line each.
    """

    folder: Path
    layout: Layout
    method: str
    base_id: str
    base_elsewhere: str | None
    card: str
    files: tuple[PublishedFile, ...]
    hashes: Hashes = field(repr=False, compare=False)
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
    published_card: str | None = None,
    token: str | None = None,
    progress: bool = False,
    hashes: Hashes | None = None,
    passing: bool = False,
    meanwhile: Callable[[Path, Shapes | None, str], object] | None = None,
) -> Built:
    """Build the folder that is published.

    Args:
        source: what ``save_pretrained`` wrote, with results.json where something was measured.
        out: the folder to write; it must not exist yet, or be empty.
        repo_id: the repo it is for; the card names it.
        revision: the tag or commit that the card's snippet pins.
        layout: ``"peft"`` publishes a DoRA in PEFT's layout. Plain LoRA is published so in any case.
        base_id: the base's id on the Hub, where the adapter names a folder.
        license: the adapter's licence; default: the one in results.json.
        base_model: load the base from there: ``"embedded"``, a folder or an id. Default: what the adapter names.
        space: id of the Space that the card's "try it" opens. Default: the one that the earlier card names.
        published_card: the earlier card, where the folder has none of its own; its free text is kept.
        token: for a private or gated base.
        progress: show bars while the base is fetched.
        hashes: of the source's files, where somebody has begun to read them already.
        passing: the folder is read once and removed: the weights may then be linked instead of copied.
        meanwhile: called while large files are hashed, with the folder, in which only verification.json is missing, the
            tensors that the loaded model has, and the text of the card.

    Raises:
        AdapterError: the folder is damaged, incomplete, or cannot be published like this.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    trained = _source_for(source, layout)
    layout = "peft" if trained.layout == "peft" else layout
    out, hashes = Path(out), hashes or Hashes()
    require_free(out)
    before = recorded_before(trained.folder, hashes)
    previous = previous_card(trained.folder)
    base = find_base_of_record(trained, base_id, base_model, token, progress)
    with whole_folder(out) as folder, ExitStack() as ending:
        copied = _copy_model(trained, folder, layout, base, hashes, passing)
        ending.callback(wait, [copied])  # so that nothing is written any more when a failed build is removed
        found = obtain_recording(trained, base, before, hashes.of)
        notes = [found.note] if found.note else []
        measured = _measured(trained, base, found)
        notes += _write_adapter(trained, folder, layout, measured, found, hashes)
        results = write_results(trained, folder, measured, license)
        write_card_pictures(trained.folder, folder, results, notes, keep=before is not None)
        card = write_card(folder, repo_id, revision, space, card_to_keep(previous, published_card, notes))
        copied.result()
        if meanwhile:
            meanwhile(folder, shapes_of_recording(found.recording, trained), card)
        if before:
            require_recorded(trained.folder, before, hashes)
        _require_unchanged(trained, found, hashes)
        _write_verification(folder, found, before, hashes)
    hashes = hashes.moved(folder, out)
    files, recorded = list_files(out, hashes), Recorded(found.reused, found.reason)
    return Built(
        out, layout, trained.method, base.id, base.elsewhere, card, files, hashes, recorded, tuple(dict.fromkeys(notes))
    )


def _source_for(folder: str | Path, layout: str) -> Source:
    """Read the adapter, which must be one that this layout can hold."""
    if layout not in ("auto", "peft"):
        raise ValueError(f"layout={layout!r}: must be 'auto' or 'peft'")
    source = read_source(folder)
    require_no_other_code(source.folder)
    if layout == "peft" and source.method == "mixlora":
        raise AdapterError("layout='peft': PEFT has no MixLoRA; publish it with the layout 'auto'")
    return source


def list_files(folder: Path, hashes: Hashes | None = None) -> tuple[PublishedFile, ...]:
    """List every file under a folder with its size and hash, sorted by path."""
    hashes = hashes or Hashes()
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return tuple(PublishedFile(name, paths[name].stat().st_size, hashes.of(paths[name])) for name in sorted(paths))


def _copy_model(
    source: Source, folder: Path, layout: Layout, base: BaseOfRecord, hashes: Hashes, link: bool
) -> Future[Any]:
    """Copy weights, tokenizer and generation settings; what the adapter has not is the base's.

    Returns:
        What tells when the weights are there: they are copied in the background.
    """
    copied: Future[Any] = Future()
    if source.layout == layout == "auto":
        copied = hashes.copy(source.folder / WEIGHTS, folder / WEIGHTS, link=link)
    else:
        hashes.start(source.folder / WEIGHTS)
        copied.set_result(None)
    if source.layout == "peft":
        copy_peft_weights(source.folder, folder)
        write_peft_config(folder, source.config, base.id, base.revision)
        hashes.start(folder / WEIGHTS)
    tokenizer = tokenizer_folder(source, base.found)
    copy_files(companion_files(tokenizer, TOKENIZING), tokenizer, folder)
    copy_files(companion_files(base.found.path, (GENERATION,)), base.found.path, folder)
    # An adapter may have these without a tokenizer of its own.
    copy_files(companion_files(source.folder, (GENERATION, TEMPLATE)), source.folder, folder)
    return copied


def _measured(source: Source, base: BaseOfRecord, found: Obtained) -> Measured:
    recording = found.recording
    fingerprint = recording.inputs["base/fingerprint"]
    return Measured(
        base.id,
        revision_of_record(source, base, fingerprint),
        fingerprint,
        recording.base_parameters,
        base.found.embedded,
        recording.parameters,
    )


def _write_adapter(
    source: Source, folder: Path, layout: Layout, base: Measured, found: Obtained, hashes: Hashes
) -> list[str]:
    """Write what makes the copied weights an adapter: configuration and code, and the folder for PEFT.

    Returns:
        What the author should know, a line each.
    """
    notes = []
    if source.method == "dora" and source.layout == "auto":
        problem = found.recording.peft_problem
        if problem and layout == "peft":
            raise AdapterError(f"layout='peft': {problem}; publish it with the layout 'auto'")
        if problem:
            notes.append(f"no {PEFT_FOLDER}/ folder: {problem}")
        else:
            peft = folder if layout == "peft" else folder / PEFT_FOLDER
            targets = PeftTargets(
                found.recording.peft_targets, found.recording.layers_path or "", found.recording.peft_fan_in_fan_out
            )
            write_dora_for_peft(source, peft, targets, base.base_id, base.base_revision)
            hashes.start(peft / WEIGHTS)
    if layout == "auto":
        config = json.dumps(_published_config(source, base), indent=2, sort_keys=True)
        (folder / OUR_CONFIG).write_text(config + "\n", encoding="utf-8", newline="\n")
        write_code(folder)
    return notes


def _published_config(source: Source, base: Measured) -> dict[str, Any]:
    """Return the configuration as it is published: the source's, naming the real base and our classes."""
    from minilora_hub.remote_code.saving import auto_map

    of = model_class(source)
    return source.config | {
        "architectures": [of.__name__],
        "auto_map": auto_map(of.config_class()),
        "base_model_name_or_path": base.base_id,
        "base_model_revision": base.base_revision,
    }


def _require_unchanged(source: Source, found: Obtained, hashes: Hashes) -> None:
    """Refuse weights or a configuration that were changed while they were published: the recording is of the others."""
    for name, digest in found.recording.inputs.items():
        kind, _, file = name.partition("/")
        if kind == "adapter" and hashes.of(source.folder / file) != digest:
            raise AdapterError(f"{file} was changed while it was published: leave it alone, and push again")


def _write_verification(folder: Path, found: Obtained, before: Verification | None, hashes: Hashes) -> None:
    """Write verification.json, or keep what an earlier build recorded where it still holds."""
    files = [file for file in list_files(folder, hashes) if not file.path.startswith(NOT_HASHED)]
    sha256 = {file.path: file.sha256 for file in files}
    recording = found.recording
    limit = TOLERANCES[recording.dtype]
    if before is not None and found.gap is not None:
        if not found.gap <= limit:
            raise AdapterError(
                f"the model's logits differ by {found.gap:.2g} from those in {VERIFICATION_FILE} (tolerance "
                f"{limit:g}): it or this installation is damaged; delete {VERIFICATION_FILE} to record it anew"
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
        base_fingerprint=recording.inputs["base/fingerprint"],
        dtype=recording.dtype,
        libraries=libraries(),
    ).save(folder)
