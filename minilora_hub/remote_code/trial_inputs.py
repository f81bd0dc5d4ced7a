"""Small inputs on which a base is run once, to see where adapters have an effect."""

import inspect
from typing import Any

import torch
from torch import Tensor

from .linear_layers import layer_device, linear_shape

TOKENS = 8


def input_device(base: Any) -> torch.device:
    """The device of a base's inputs."""
    try:
        embedding = base.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # it takes no tokens
        embedding = None
    if embedding is None or next(embedding.parameters(), None) is None:
        embedding = next(module for module in base.modules() if linear_shape(module))
    return layer_device(embedding)


def trial_inputs(base: Any) -> dict[str, Tensor]:
    """Return a few tokens, none of which stands for an image or a sound, or one sound where the base takes no tokens.

    Raises:
        ValueError: the base takes another kind of input.
    """
    device, config = input_device(base), base.config
    parameters = inspect.signature(base.forward).parameters
    tokens = _tokens(base).to(device) if "input_ids" in parameters or "decoder_input_ids" in parameters else None
    inputs: dict[str, Tensor] = {}
    if "input_ids" in parameters and tokens is not None:
        inputs["input_ids"] = tokens
    else:
        inputs[base.main_input_name] = _wave(*_shape(base, base.main_input_name)).to(device, base.dtype)
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False) and tokens is not None:
        inputs["decoder_input_ids"] = tokens
    return inputs


def _tokens(base: Any) -> Tensor:
    config = base.config.get_text_config(decoder=True)
    marks = {
        value
        for name, value in base.config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    return torch.tensor([[token for token in range(config.vocab_size) if token not in marks][:TOKENS]])


def _shape(base: Any, name: str) -> tuple[int, ...]:
    """Shape of an input that is no text, for a batch of one."""
    config = base.config
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        return (1, config.num_mel_bins, 2 * config.max_source_positions)  # Whisper takes no other length
    raise ValueError(f"it takes {name}, of which the shape is not known")


def _wave(*shape: int) -> Tensor:
    """Values that differ, without touching the random state."""
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32)).view(shape)
