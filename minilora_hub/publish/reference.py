"""The half of building that loads models: what the adapter computes on its base, and whether PEFT computes the same.

Base and adapter are loaded by our installed classes, so nothing of the folder is run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import with_peft, write_peft_folder
from minilora_hub.publish.bases_of_record import BaseOfRecord, load_base
from minilora_hub.publish.recording import TOLERANCES, Recording, difference, logits_of, prompt_ids, record
from minilora_hub.publish.shapes import Shapes, shapes_of_model
from minilora_hub.publish.sources import PEFT_FOLDER, TOKENIZER_FILES, WEIGHTS, Layout, Source
from minilora_hub.results import Verification


class Reference:
    """What the adapter of a folder computes on its base.

    Args:
        source: the adapter.
        folder: where it is built: with its weights and tokenizer, and adapter_config.json in PEFT's layout.
        layout: what is built; a DoRA gets its folder for PEFT from here.
        base: its base.
        before: an earlier recording, to be compared with.

    Attributes:
        fingerprint: the base's.
        dtype: what was computed in, e.g. ``"float32"``.
        base_parameters: how many the base has.
        base_revision: the base's commit on the Hub; None where it is not known.
        parameters: how many the adapter has.
        shapes: which tensors it must have; None where that is not ours to say, or its configuration is of another base.
        recording: what it computes.
        gap: how far that is from the earlier recording; None where there is none of this base and dtype.
        notes: what the author should know, a line each.

    Raises:
        AdapterError: the base is not the one it was trained on, or PEFT cannot read what it is to have.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """

    def __init__(
        self, source: Source, folder: Path, layout: Layout, base: BaseOfRecord, before: Verification | None
    ) -> None:
        """Load both, and record; see the class."""
        self.notes: list[str] = []
        self.shapes: Shapes | None = None
        self._source, self._folder, self._base_id = source, folder, base.id
        self._base, self.fingerprint, self.dtype = load_base(source, base)
        self.base_parameters = sum(parameter.numel() for parameter in self._base.parameters())
        self.base_revision = base.revision
        if base.revision is None and base.found.hub_id == base.id and self.fingerprint != "unknown":
            # The weights are the ones it was trained on, so this commit holds them.
            self.base_revision = base.found.revision if source.base_fingerprint == self.fingerprint else None
        vocabulary = int(self._base.get_input_embeddings().num_embeddings)
        prompts = prompt_ids(_tokenizer(folder), vocabulary)
        if source.layout == "peft":
            self._record_peft(prompts, before)
        else:
            self._record_ours(prompts, before, layout)
        del self._base  # it is large

    def _record_ours(self, prompts: Sequence[Sequence[int]], before: Verification | None, layout: Layout) -> None:
        import torch

        from minilora_hub.remote_code.adapter_files import read_adapter

        source, folder = self._source, self._folder
        dtype = getattr(torch, self.dtype)
        model = model_class(source).from_pretrained(str(source.folder), base_model=self._base, dtype=dtype)
        self.parameters, sites = model.num_adapter_parameters(), list(model.sites)
        self.shapes, config = shapes_of_model(model, source.config), model.config
        self._record(model, prompts, before)
        self._base = model.unload()
        if source.method != "dora":
            return
        peft = folder if layout == "peft" else folder / PEFT_FOLDER
        # From the file, in the dtype they were saved in; the model's may be wider.
        tensors = read_adapter(source.folder / WEIGHTS)
        write_peft_folder(peft, config, tensors, sites, self._base, self._base_id, self.base_revision)
        reason = self._difference_of(peft)
        if reason and layout == "peft":
            raise AdapterError(f"layout='peft': {reason}; publish it with the layout 'auto'")
        if reason:
            shutil.rmtree(peft)
            self.notes.append(f"no {PEFT_FOLDER}/ folder: {reason}")

    def _record_peft(self, prompts: Sequence[Sequence[int]], before: Verification | None) -> None:
        model = with_peft(self._base, self._folder)
        self.parameters = sum(parameter.numel() for parameter in model.parameters()) - self.base_parameters
        self._record(model, prompts, before)

    def _record(self, model: Any, prompts: Sequence[Sequence[int]], before: Verification | None) -> None:
        self.recording: Recording = record(model, prompts)
        self.gap: float | None = None
        if before is not None and (before.dtype, before.base_fingerprint) == (self.dtype, self.fingerprint):
            self.gap = difference(before.top_logits, *logits_of(model, before.prompts, before.top_tokens))

    def _difference_of(self, folder: Path) -> str | None:
        """Why PEFT does not compute from `folder` what our own code does; None if it does."""
        ours = self.recording
        try:
            model = with_peft(self._base, folder)
            gap = difference(ours.top_logits, *logits_of(model, ours.prompts, ours.top_tokens))
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            return f"PEFT cannot read this adapter ({type(error).__name__}: {error})"
        return None if gap <= TOLERANCES[self.dtype] else f"PEFT computes other logits from this adapter (by {gap:.2g})"


def published_config(source: Source, base_id: str, base_revision: str | None) -> dict[str, Any]:
    """Return the configuration as it is published: the source's, naming the real base and our classes."""
    from minilora_hub.remote_code.adapted_model import auto_map

    of = model_class(source)
    return source.config | {
        "architectures": [of.__name__],
        "auto_map": auto_map(of.config_class()),
        "base_model_name_or_path": base_id,
        "base_model_revision": base_revision,
    }


def model_class(source: Source) -> Any:
    """Return our installed class for an adapter in our format."""
    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    return MixLoraForCausalLM if source.method == "mixlora" else DoraForCausalLM


def _tokenizer(folder: Path) -> Any | None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        # Where config.json names a class of ours, AutoTokenizer would ask to run the repo's code: not here yet.
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder)
        raise AdapterError(f"the tokenizer of the adapter cannot be loaded: {error}") from error
