"""What an adapter computes on its base, with both loaded; and whether PEFT computes the same.

They are loaded from their files by our installed classes, as somebody loads them who has only the files: nothing of the
folder is run, and nothing of the model that was trained is used.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.companions import own_tokenizer
from minilora_hub.adapter_folder.folders import AdapterFolder as Source
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import Verification
from minilora_hub.bases.loading import load_base
from minilora_hub.bases.skeleton import BaseSource
from minilora_hub.formats.peft import PeftTargets, peft_targets, with_peft, write_peft_folder
from minilora_hub.formats.reading import read_adapter
from minilora_hub.recording.bases_of_record import BaseOfRecord, wanted_dtype
from minilora_hub.recording.document import Recording
from minilora_hub.recording.inputs import tokenizer_folder
from minilora_hub.recording.logits import TOLERANCES, TopLogits, difference, logits_of, prompt_ids, record
from minilora_hub.recording.shapes import Shapes, shapes_of_model


def make_recording(
    source: Source, base: BaseOfRecord, inputs: dict[str, str], base_stamp: str, before: Verification | None = None
) -> tuple[Recording, float | None]:
    """Load the base and the adapter, and record what they compute.

    Args:
        source: the adapter.
        base: its base.
        inputs: what the recording depends on; it holds the base's fingerprint.
        base_stamp: of the base's weights, from before they were hashed.
        before: an earlier recording, to be compared with.

    Returns:
        The recording, and how far what it says is from the earlier one: None where there is none of this base and
        dtype.

    Raises:
        BaseModelError: the base cannot be loaded.
        ValueError: the weights do not fit the configuration and the base; the message names the tensor.
    """
    model_of_base = load_base(base.found, dtype=wanted_dtype(base.found))
    dtype = str(model_of_base.dtype).removeprefix("torch.")
    base_parameters = sum(parameter.numel() for parameter in model_of_base.parameters())
    vocabulary = int(model_of_base.get_input_embeddings().num_embeddings)
    prompts = prompt_ids(own_tokenizer(tokenizer_folder(source, base.found)), vocabulary)
    if before is not None and (before.dtype, before.base_fingerprint) != (dtype, inputs["base/fingerprint"]):
        before = None
    look = _look_at_peft if source.layout == "peft" else _look_at_ours
    top, gap, found = look(source, model_of_base, dtype, prompts, before)
    recording = Recording(
        inputs=inputs,
        base_stamp=base_stamp,
        prompts=top.prompts,
        top_tokens=top.top_tokens,
        top_logits=top.top_logits,
        dtype=dtype,
        base_parameters=base_parameters,
        **found,
    )
    return recording.sealed(), gap


def _look_at_ours(
    source: Source, base: Any, dtype: str, prompts: Sequence[Sequence[int]], before: Verification | None
) -> tuple[TopLogits, float | None, dict[str, Any]]:
    import torch

    from minilora_hub.remote_code.base_structure import find_decoder_layers

    model = model_class(source).from_pretrained(str(source.folder), base_model=base, dtype=getattr(torch, dtype))
    shapes = shapes_of_model(model, source.config)
    found = {
        "parameters": model.num_adapter_parameters(),
        "layers_path": find_decoder_layers(model.base)[0],
        "tensors": None if shapes is None else shapes.tensors,
    }
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


def _look_at_peft(
    source: Source, base: Any, dtype: str, prompts: Sequence[Sequence[int]], before: Verification | None
) -> tuple[TopLogits, float | None, dict[str, Any]]:
    of_base = sum(parameter.numel() for parameter in base.parameters())
    read_adapter(source, BaseSource.of_model(base))  # PEFT passes over what it does not know
    model = with_peft(base, source.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters()) - of_base
    return record(model, prompts), _gap(model, before), {"parameters": parameters}


def _gap(model: Any, before: Verification | None) -> float | None:
    if before is None:
        return None
    return difference(before.top_logits, *logits_of(model, before.prompts, before.top_tokens))


def _difference_in_peft(
    source: Source, base: Any, targets: PeftTargets, ours: TopLogits, tolerance: float
) -> str | None:
    """Why PEFT does not compute from a folder in its format what our own code does; None if it does."""
    with tempfile.TemporaryDirectory(prefix="minilora-peft-") as scratch:
        write_dora_for_peft(source, Path(scratch), targets, str(source.base), None)
        try:
            model = with_peft(base, Path(scratch))
            gap = difference(ours.top_logits, *logits_of(model, ours.prompts, ours.top_tokens))
        except (ValueError, KeyError, RuntimeError, TypeError) as error:
            return f"PEFT cannot read this adapter ({type(error).__name__}: {error})"
    return None if gap <= tolerance else f"PEFT computes other logits from this adapter (by {gap:.2g})"


def write_dora_for_peft(
    source: Source, folder: Path, targets: PeftTargets, base_id: str, base_revision: str | None
) -> None:
    """Write a DoRA in our format as PEFT reads it; the base need not be loaded."""
    from minilora_hub import DoraConfig
    from minilora_hub.remote_code.adapter_files import read_adapter

    # From the file, in the dtype they were saved in; a model's may be wider.
    tensors = read_adapter(source.folder / WEIGHTS)
    config = DoraConfig.from_dict(dict(source.config))
    write_peft_folder(folder, config, tensors, targets, base_id, base_revision)


def shapes_of_recording(recording: Recording, source: Source) -> Shapes | None:
    """Return which tensors the adapter must have; None where that is not known from the recording."""
    if recording.tensors is None or recording.layers_path is None:
        return None
    return Shapes(source.config, recording.tensors, recording.layers_path)


def model_class(source: Source) -> Any:
    """Return our installed class for an adapter in our format."""
    from minilora_hub import DoraForCausalLM, MixLoraForCausalLM

    return MixLoraForCausalLM if source.method == "mixlora" else DoraForCausalLM
