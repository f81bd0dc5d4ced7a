"""From a trained folder to exactly the folder that is published.

    config.json with auto_map    adapter_model.safetensors    the island's files of this version
    tokenizer, chat template     generation_config.json       README.md  results.json  verification.json  pictures
    peft/                        the same adapter in PEFT's format, where PEFT can read it (DoRA)

There is never an `adapter_config.json` at the root of such a repo: AutoModel would then take the base's config and
never see the class. Plain LoRA, and `layout="peft"`, are published in PEFT's own layout instead, without code.

Building loads the base and the adapter with our installed classes, so nothing of the folder is run, and records what
the model computes. The folder appears whole or not at all.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.errors import AdapterError
from minilora_hub.publish import bases_of_record
from minilora_hub.publish.documents import CARD, Measured, previous_card, write_card, write_card_pictures, write_results
from minilora_hub.publish.island import island_files
from minilora_hub.publish.peft_layout import copy_peft_weights, with_peft, write_peft_config, write_peft_folder
from minilora_hub.publish.recording import TOLERANCES, Recording, difference, libraries, logits_of, prompt_ids, record
from minilora_hub.publish.sources import (
    COMPANIONS,
    OUR_CONFIG,
    TOKENIZER_FILES,
    WEIGHTS,
    Layout,
    Source,
    file_sha256,
    read_source,
    recorded_before,
)
from minilora_hub.results import VERIFICATION_FILE, Verification

GENERATION = "generation_config.json"
PEFT_FOLDER = "peft"
NOT_HASHED = (CARD, VERIFICATION_FILE)
"""People edit the card on the Hub's page, and a file cannot hold its own hash."""


@dataclass(frozen=True)
class PublishedFile:
    """A file as it is published: its path in the repo, its size in bytes, its sha256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Built:
    """What `build` made.

    Attributes:
        folder: the folder, as it is published.
        layout: ``"auto"`` (AutoModel with our code) or ``"peft"``.
        method: ``"mixlora"``, ``"dora"`` or ``"lora"``.
        base_id: the base's id on the Hub, as the configuration names it.
        base_elsewhere: where the base was loaded from, where that is not `base_id` on the Hub.
        files: every file in it, sorted by path.
        notes: what the author should know, a line each.
    """

    folder: Path
    layout: Layout
    method: str
    base_id: str
    base_elsewhere: str | None
    files: tuple[PublishedFile, ...]
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
    token: str | None = None,
    progress: bool = False,
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
        token: for a private or gated base.
        progress: show bars while the base is fetched.

    Raises:
        AdapterError: the folder is damaged, incomplete, or cannot be published like this.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    if layout not in ("auto", "peft"):
        raise ValueError(f"layout={layout!r}: must be 'auto' or 'peft'")
    trained, out = read_source(source), Path(out)
    if layout == "peft" and trained.method == "mixlora":
        raise AdapterError("layout='peft': PEFT has no MixLoRA; publish it with the layout 'auto'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"out={str(out)!r}: must be a folder that is empty, or not there yet")
    before = recorded_before(trained.folder)
    previous = previous_card(trained.folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=out.parent) as scratch:
        folder = Path(scratch, "repo")
        folder.mkdir()
        builder = _Builder(trained, folder, layout, base_id, base_model, token, progress)
        builder.write_model(before)
        results = write_results(trained, folder, builder.measured(), license)
        write_card_pictures(trained.folder, folder, results, builder.notes, keep=before is not None)
        builder.write_verification(before)
        write_card(folder, repo_id, revision, previous, builder.notes)
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    elsewhere, files = builder.base_elsewhere, list_files(out, builder.hashes)
    return Built(out, builder.layout, trained.method, builder.base_id, elsewhere, files, tuple(builder.notes))


def list_files(folder: Path, known: dict[str, str] | None = None) -> tuple[PublishedFile, ...]:
    """List every file under a folder with its size and hash, sorted by path; hashes that are `known` are taken."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    found = [(name, path.stat().st_size, (known or {}).get(name) or file_sha256(path)) for name, path in paths.items()]
    return tuple(PublishedFile(*entry) for entry in sorted(found))


class _Builder:
    """The steps that need the base: they share it, since it is large."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        layout: Layout,
        base_id: str | None,
        base_model: str | None,
        token: str | None,
        progress: bool,
    ) -> None:
        self.source, self.folder = source, folder
        self.layout: Layout = "peft" if source.layout == "peft" else layout
        self.base_id, self.base_revision = bases_of_record.published_base(source, base_id)
        self.notes: list[str] = []
        base, resolved, self.fingerprint, self.dtype = bases_of_record.load_base(
            source, self.base_id, base_model, token, progress
        )
        self.base_path, self.embedded = resolved.path, resolved.embedded
        from_hub = resolved.hub_id == self.base_id and not resolved.embedded
        self.base_elsewhere = None if from_hub else str(resolved.path)
        if self.base_revision is None and resolved.hub_id == self.base_id and self.fingerprint != "unknown":
            # The weights are the ones it was trained on, so this commit holds them.
            known = source.base_fingerprint == self.fingerprint
            self.base_revision = resolved.revision if known else None
        self.base_parameters = sum(parameter.numel() for parameter in base.parameters())
        self._base = base

    def write_model(self, before: Verification | None) -> None:
        """Write weights, configuration, code and companions, and record what the model computes."""
        source, folder = self.source, self.folder
        if source.layout == "peft":
            copy_peft_weights(source.folder, folder)
        else:
            shutil.copyfile(source.folder / WEIGHTS, folder / WEIGHTS)
        own = any((source.folder / name).is_file() for name in TOKENIZER_FILES)
        for name in COMPANIONS:
            # PEFT saves no tokenizer: then it is the base's, all of it.
            found = (source.folder if own or name == GENERATION else self.base_path) / name
            found = found if found.is_file() or name != GENERATION else self.base_path / name
            if found.is_file():
                shutil.copyfile(found, folder / name)
        prompts = prompt_ids(_tokenizer(folder), self._vocabulary())
        self.gap: float | None = None
        if source.layout == "peft":
            write_peft_config(folder, source.config, self.base_id, self.base_revision)
            self.parameters, self.recording = self._record_peft(folder, prompts, before)
            return
        from minilora_hub.remote_code.adapter_files import read_adapter

        model = self._adapted()
        self.parameters, self.recording = model.num_adapter_parameters(), record(model, prompts)
        self.gap = self._gap_to(before, model)
        sites = list(model.sites)
        # From the file, in the dtype they were saved in; the model's may be wider.
        tensors = read_adapter(source.folder / WEIGHTS)
        self._base = model.unload()
        if self.layout == "peft":
            write_peft_folder(folder, self._config(), tensors, sites, self._base, self.base_id, self.base_revision)
            self._compare(folder, required=True)
            return
        self._config().to_json_file(folder / OUR_CONFIG)
        for name, path in island_files().items():
            shutil.copyfile(path, folder / name)
        if source.method == "dora":
            peft = folder / PEFT_FOLDER
            write_peft_folder(peft, self._config(), tensors, sites, self._base, self.base_id, self.base_revision)
            if not self._compare(peft, required=False):
                shutil.rmtree(peft)

    def write_verification(self, before: Verification | None) -> None:
        """Write verification.json, or keep what an earlier build recorded where it still holds."""
        hashes = {file.path: file.sha256 for file in list_files(self.folder) if file.path not in NOT_HASHED}
        self.hashes = hashes
        recording = self.recording
        if before is not None and self.gap is not None:
            limit = TOLERANCES[self.dtype]
            if not self.gap <= limit:
                raise AdapterError(
                    f"the model's logits differ by {self.gap:.2g} from those in {VERIFICATION_FILE} (tolerance "
                    f"{limit:g}): it or this installation is damaged; delete {VERIFICATION_FILE} to record it anew"
                )
            same_files = before.sha256 == hashes and before.prompts == recording.prompts
            if same_files and before.libraries == libraries() and before.tolerance == limit:
                before.save(self.folder)
                return
        Verification(
            prompts=recording.prompts,
            top_tokens=recording.top_tokens,
            top_logits=recording.top_logits,
            tolerance=TOLERANCES[self.dtype],
            sha256=hashes,
            base_fingerprint=self.fingerprint,
            dtype=self.dtype,
            libraries=libraries(),
        ).save(self.folder)

    def measured(self) -> Measured:
        """What results.json tells of the adapter and its base."""
        return Measured(
            self.base_id,
            self.base_revision,
            self.fingerprint,
            self.base_parameters,
            self.embedded,
            self.parameters,
        )

    def _config(self) -> Any:
        """The configuration as it is published: the source's, naming the real base."""
        from minilora_hub.remote_code.adapted_model import auto_map

        model_class = self._model_class()
        config = copy.deepcopy(model_class.config_class.from_pretrained(str(self.source.folder)))
        config.base_model_name_or_path, config.base_model_revision = self.base_id, self.base_revision
        config.architectures = [model_class.__name__]
        config.auto_map = auto_map(config)
        return config

    def _model_class(self) -> Any:
        from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

        return MixLoraForCausalLM if self.source.method == "mixlora" else DoraForCausalLM

    def _adapted(self) -> Any:
        import torch

        dtype = getattr(torch, self.dtype)
        return self._model_class().from_pretrained(str(self.source.folder), base_model=self._base, dtype=dtype)

    def _vocabulary(self) -> int:
        return int(self._base.get_input_embeddings().num_embeddings)

    def _gap_to(self, before: Verification | None, model: Any) -> float | None:
        """How far the model is from an earlier recording; None where there is none of this base and dtype."""
        if before is None or (before.dtype, before.base_fingerprint) != (self.dtype, self.fingerprint):
            return None
        return difference(before.top_logits, *logits_of(model, before.prompts, before.top_tokens))

    def _record_peft(self, folder: Path, prompts: Any, before: Verification | None = None) -> tuple[int, Recording]:
        """Load PEFT's format and record; the base is the adapter's afterwards."""
        model = with_peft(self._base, folder)
        parameters = sum(p.numel() for p in model.parameters()) - self.base_parameters
        recording = record(model, prompts)
        self.gap = self._gap_to(before, model) if before else self.gap
        self._base = model.unload()
        return parameters, recording

    def _compare(self, folder: Path, *, required: bool) -> bool:
        """Whether PEFT computes from `folder` what our own code does."""
        ours = self.recording
        try:
            model = with_peft(self._base, folder)
            gap = difference(ours.top_logits, *logits_of(model, ours.prompts, ours.top_tokens))
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            reason = f"PEFT cannot read this adapter ({type(error).__name__}: {error})"
        else:
            self._base = model.unload()
            if gap <= TOLERANCES[self.dtype]:
                return True
            reason = f"PEFT computes other logits from this adapter (by {gap:.2g})"
        if required:
            raise AdapterError(f"layout='peft': {reason}; publish it with the layout 'auto'")
        self.notes.append(f"no {PEFT_FOLDER}/ folder: {reason}")
        return False


def _tokenizer(folder: Path) -> Any | None:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    from transformers import PreTrainedTokenizerFast

    try:
        # Where config.json names a class of ours, AutoTokenizer would ask to run the repo's code: not here yet.
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        raise AdapterError(f"the tokenizer of the adapter cannot be loaded: {error}") from error
