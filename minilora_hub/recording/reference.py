"""Record an adapter's reference logits, and check that PEFT computes the same; reuse a recording that is still valid.

Both are loaded from their files by our installed classes: no code of the folder is run, and the model that was trained
is not used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.folders import read_source
from minilora_hub.adapter_folder.names import PROCESSING, TOKENIZER_FILES, WEIGHTS
from minilora_hub.adapter_folder.tasks import CAUSAL_LM, CLASS_PREFIXES
from minilora_hub.adapter_folder.verification import Verification
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.resolving import ResolvedBase
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.errors import AdapterError
from minilora_hub.formats.peft import PeftTargets, peft_targets, with_peft, write_peft_folder
from minilora_hub.formats.reading import read_adapter
from minilora_hub.recording.document import RECORDING_FILE, Recording, recording_key
from minilora_hub.recording.inputs import inputs_to_record
from minilora_hub.recording.logits import TOLERANCES, TopLogits, difference, logits_of, prompt_ids, record
from minilora_hub.recording.recorded_base import (
    RecordedBase,
    require_trained_on,
    wanted_dtype,
    why_not_reproducible,
)


@dataclass(frozen=True)
class Obtained:
    """A recording, and where it comes from.

    Attributes:
        recording: what the adapter computes on its base.
        reused: whether it was read from `recording.json`, so that the base was not loaded.
        reason: why it was reused or made.
        gap: its difference from an earlier verification.json; None where there is none to compare with.
        note: a note for the author, or None.
    """

    recording: Recording
    reused: bool
    reason: str
    gap: float | None = None
    note: str | None = None


def obtain_recording(source: Source, base: RecordedBase, before: Verification | None = None) -> Obtained:
    """Return what an adapter computes on its base: from its recording.json, or else computed now and stored there.

    A folder that was published before has a verification.json: it is always computed again and compared with that, and
    nothing is written into the folder.

    Args:
        source: the adapter.
        base: its base.
        before: the folder's verification.json.

    Raises:
        AdapterError: the base is not the one it was trained on.
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    from minilora_hub.remote_code.adapter_files import base_fingerprint

    fingerprint = base_fingerprint(str(base.found.path))
    require_trained_on(source, base, fingerprint)
    key = recording_key(source, base.found, fingerprint)
    if before is not None:
        recording, gap = make_recording(source, base, key, before)
        return Obtained(recording, False, "the folder was published before: compared with its recorded logits", gap)
    stored, reason, note = _read_stored(source.folder, key)
    reason = reason or why_not_reproducible(base.found, fingerprint) or ""
    if stored is not None and not reason:
        return Obtained(stored, True, f"nothing that {RECORDING_FILE} depends on has changed")
    recording, _ = make_recording(source, base, key)
    try:
        recording.save(source.folder)
    except OSError as error:
        why = error.strerror or type(error).__name__
        note = f"{RECORDING_FILE} cannot be stored in {source.name!r} ({why}): the next push records again"
    return Obtained(recording, False, reason, note=note)


def store_recording(folder: str | Path, base: ResolvedBase) -> None:
    """Record an adapter that was just saved, from its files, so that a push need not load the base.

    Raises:
        AdapterError, BaseModelError, ValueError: see `obtain_recording`.
    """
    obtain_recording(read_source(folder), RecordedBase(base.hub_id or base.name, base.revision, base))


def _read_stored(folder: Path, key: dict[str, str]) -> tuple[Recording | None, str, str | None]:
    """Return the recording of a folder, why it cannot be used ("" if it can), and what the author should know."""
    if not (folder / RECORDING_FILE).is_file():
        return None, f"there was no {RECORDING_FILE}", None
    try:
        stored = Recording.load(folder)
    except AdapterError as error:
        return None, f"{RECORDING_FILE} cannot be used", f"recorded again: {error}"
    changed = [name for name in key if stored.key.get(name) != key[name]]
    return stored, f"changed since it was recorded: {', '.join(changed)}" if changed else "", None


def make_recording(
    source: Source, base: RecordedBase, key: dict[str, str], before: Verification | None = None
) -> tuple[Recording, float | None]:
    """Load the base and the adapter, and record what they compute.

    Args:
        source: the adapter.
        base: its base.
        key: what the recording depends on; it holds the base's fingerprint.
        before: an earlier recording to compare with.

    Returns:
        The recording, and its difference from the earlier one: None where there is none of this base and dtype.

    Raises:
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    if source.auto_class != CAUSAL_LM:
        return _record_head(source, base, key, before)
    model_of_base = load_base(base.found, dtype=wanted_dtype(base.found))
    dtype = str(model_of_base.dtype).removeprefix("torch.")
    base_parameters = sum(parameter.numel() for parameter in model_of_base.parameters())
    vocabulary = int(model_of_base.get_input_embeddings().num_embeddings)
    prompts = prompt_ids(own_tokenizer(tokenizer_folder(source, base.found)), vocabulary)
    if before is not None and (before.dtype, before.base_fingerprint) != (dtype, key["base"]):
        before = None
    compute = _compute_peft if source.layout == "peft" else _compute_ours
    top, gap, found = compute(source, model_of_base, dtype, prompts, before)
    recording = Recording(
        key=key,
        prompts=top.prompts,
        top_tokens=top.top_tokens,
        top_logits=top.top_logits,
        dtype=dtype,
        base_parameters=base_parameters,
        **found,
    )
    return recording.sealed(), gap


def _record_head(
    source: Source, base: RecordedBase, key: dict[str, str], before: Verification | None
) -> tuple[Recording, float | None]:
    """`make_recording` for an adapter on a base with another head, part of which may be in the adapter."""
    model = model_class(source).from_pretrained(
        str(source.folder), base_model=str(base.found.path), dtype=wanted_dtype(base.found)
    )
    dtype = str(model.base.dtype).removeprefix("torch.")
    parameters = model.num_adapter_parameters()
    prompts, note = inputs_to_record(model, tokenizer_folder(source, base.found), processor_folder(source, base.found))
    top = record(model, prompts)
    if before is not None and (before.dtype, before.base_fingerprint) != (dtype, key["base"]):
        before = None
    recording = Recording(
        key=key,
        prompts=top.prompts,
        top_tokens=top.top_tokens,
        top_logits=top.top_logits,
        dtype=dtype,
        base_parameters=sum(parameter.numel() for parameter in model.parameters()) - parameters,
        parameters=parameters,
        peft_problem=f"it is not written for PEFT with the head of {source.auto_class}",
        note=note,
    )
    return recording.sealed(), _gap(model, before)


def _compute_ours(
    source: Source, base: Any, dtype: str, prompts: Sequence[tuple[int, ...]], before: Verification | None
) -> tuple[TopLogits, float | None, dict[str, Any]]:
    import torch

    from minilora_hub.remote_code.layer_stacks import find_decoder_layers

    model = model_class(source).from_pretrained(str(source.folder), base_model=base, dtype=getattr(torch, dtype))
    found = {"parameters": model.num_adapter_parameters(), "layers_path": find_decoder_layers(model.base)[0]}
    top, gap = record(model, prompts), _gap(model, before)
    sites = list(model.sites)
    base = model.unload()
    if source.method == "dora":
        targets = peft_targets(sites, base)
        problem = _difference_in_peft(source, base, targets, top, TOLERANCES[dtype])
        found |= {
            "peft_targets": targets.names,
            "peft_fan_in_fan_out": targets.fan_in_fan_out,
            "peft_problem": problem,
        }
    return top, gap, found


def _compute_peft(
    source: Source, base: Any, dtype: str, prompts: Sequence[tuple[int, ...]], before: Verification | None
) -> tuple[TopLogits, float | None, dict[str, Any]]:
    of_base = sum(parameter.numel() for parameter in base.parameters())
    read_adapter(source, BaseSource.of_model(base))  # PEFT ignores tensors that it does not know
    model = with_peft(base, source.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters()) - of_base
    return record(model, prompts), _gap(model, before), {"parameters": parameters}


def _gap(model: Any, before: Verification | None) -> float | None:
    if before is None:
        return None
    try:
        return difference(before.top_logits, *logits_of(model, before.prompts, before.top_tokens))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:  # a tensor of other arguments or another shape
        raise AdapterError(f"{Verification.FILE}: the model cannot be called with its prompts: {error}") from error


def _difference_in_peft(
    source: Source, base: Any, targets: PeftTargets, ours: TopLogits, tolerance: float
) -> str | None:
    """Return why PEFT computes other logits from a folder in its format than our code does; None if it does not."""
    with tempfile.TemporaryDirectory(prefix="minilora-peft-") as scratch:
        try:
            write_dora_for_peft(source, Path(scratch), targets, str(source.base), None)
            model = with_peft(base, Path(scratch))
            gap = difference(ours.top_logits, *logits_of(model, ours.prompts, ours.top_tokens))
        except (AdapterError, ValueError, KeyError, RuntimeError, TypeError) as error:
            return f"PEFT cannot read this adapter ({type(error).__name__}: {error})"
    return None if gap <= tolerance else f"PEFT computes other logits from this adapter (by {gap:.2g})"


def write_dora_for_peft(
    source: Source, folder: Path, targets: PeftTargets, base_id: str, base_revision: str | None
) -> None:
    """Write a DoRA that is in our format into a folder in PEFT's format, without its base."""
    from minilora_hub import DoraConfig
    from minilora_hub.remote_code.adapter_files import read_adapter

    # From the file, in the dtype they were saved in; a model's may be wider.
    tensors = read_adapter(source.folder / WEIGHTS)
    config = DoraConfig.from_dict(dict(source.config))
    write_peft_folder(folder, config, tensors, targets, base_id, base_revision)


def tokenizer_folder(source: Source, base: ResolvedBase) -> Path:
    """Return the folder of the adapter's tokenizer: the base's, where it has none, as in PEFT."""
    return source.folder if _has_any(source.folder, TOKENIZER_FILES) else base.path


def processor_folder(source: Source, base: ResolvedBase) -> Path:
    """Return the folder of the adapter's processor of pictures or sounds: the base's, where it has none."""
    return source.folder if _has_any(source.folder, PROCESSING) else base.path


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def model_class(source: Source) -> Any:
    """Return our installed class for an adapter in our format."""
    from minilora_hub.remote_code.modeling_minilora import adapted_class

    return adapted_class(CLASS_PREFIXES[source.method], source.auto_class)
