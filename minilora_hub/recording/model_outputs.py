"""Compute the recorded values of a model, from inputs as recording.json and verification.json hold them.

`publish/verify/isolated_worker.py` runs this file where minilora_hub cannot be imported, so it imports torch only.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CYCLE = 101
"""Values of an image or a sound are numbers of a cycle of this length, which every machine computes equally."""


def arguments_of(model: Any, prompt: Any) -> dict[str, Tensor]:
    """Return the arguments of a model's forward for one input.

    Args:
        model: the model.
        prompt: token ids, or {argument: {"shape": …, "values" or "step": …}}; see `verification.InputTensor`.
    """
    if isinstance(prompt, Mapping):
        return {name: _tensor(given, model) for name, given in prompt.items()}
    ids = torch.tensor([list(prompt)], device=model.device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", 0) else {})}


def _tensor(given: Mapping[str, Any], model: Any) -> Tensor:
    shape = tuple(given["shape"])
    if given.get("values") is not None:
        values = torch.tensor(given["values"], device=model.device)
        return values.expand(shape).clone() if len(values) == 1 else values.view(shape)
    places = torch.arange(torch.Size(shape).numel(), device=model.device)
    waves = (places * given["step"] % CYCLE).float() / (CYCLE // 2) - 1
    return waves.view(shape).to(getattr(model, "base", model).dtype)


def recorded_row(outputs: Any) -> Tensor:
    """Return the values that are recorded of the outputs for one input, (values,).

    They are the logits at the last position: of the vocabulary, or of the classes. Of a question's answer they are the
    scores of all starts and ends; of an image and a text, how well they fit and their embeddings; of a model without a
    head its last hidden state.
    """
    if "start_logits" in outputs:
        return torch.cat([outputs["start_logits"][0], outputs["end_logits"][0]]).float()
    if "logits_per_image" in outputs:
        names = ("logits_per_image", "image_embeds", "text_embeds")
        return torch.cat([outputs[name].flatten() for name in names]).float()
    rows = outputs["logits" if "logits" in outputs else "last_hidden_state"][0]
    return (rows if rows.dim() == 1 else rows.flatten(0, -2)[-1]).float()


def logits_of(
    model: Any, prompts: Sequence[Any], tokens: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[float | None]]:
    """Compute, per input, the values at given places of the row and the largest of all others.

    Returns NaN for an input with a token outside the vocabulary, and for a place outside the row.
    """
    wanted: list[list[float]] = []
    highest: list[float | None] = []
    with torch.no_grad():
        for prompt, some in zip(prompts, tokens, strict=True):
            is_known = _is_known(model, prompt)
            row = recorded_row(model(**arguments_of(model, prompt))) if is_known else torch.zeros(0)
            if not all(0 <= token < len(row) for token in some):
                wanted.append([float("nan")] * len(some))
                highest.append(None)
                continue
            others = torch.ones_like(row, dtype=torch.bool)
            others[list(some)] = False
            wanted.append(row[list(some)].tolist())
            highest.append(row[others].max().item() if others.any() else None)
    return wanted, highest


def _is_known(model: Any, prompt: Any) -> bool:
    ids = [prompt]
    if isinstance(prompt, Mapping):
        ids = [given.get("values") or () for name, given in prompt.items() if name.endswith("input_ids")]
    if not any(ids):
        return True
    try:
        size = model.get_input_embeddings().num_embeddings
    except NotImplementedError:  # a base of two parts, such as CLIP
        size = getattr(model, "base", model).config.get_text_config().vocab_size
    return all(0 <= token < size for some in ids for token in some)
