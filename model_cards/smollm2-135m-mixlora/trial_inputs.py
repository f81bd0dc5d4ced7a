"""Small inputs on which a base is run once, to see where adapters have an effect."""

import inspect
import math
from typing import Any

import torch
from torch import Tensor

from .layer_stacks import input_embeddings, is_dual_encoder
from .linear_layers import layer_device, linear_shape

TOKENS = 8


def input_device(base: Any) -> torch.device:
    """The device of a base's inputs."""
    embedding = input_embeddings(base)
    if embedding is None or next(embedding.parameters(), None) is None:
        embedding = next(module for module in base.modules() if linear_shape(module))
    return layer_device(embedding)


def trial_inputs(base: Any) -> dict[str, Tensor]:
    """Return a few tokens, none of which stands for an image or a sound, and an image or sound where one is needed."""
    device, config = input_device(base), base.config
    parameters = inspect.signature(base.forward).parameters
    inputs: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        inputs["input_ids"] = _tokens(base).to(device)
    with_image = is_dual_encoder(base) and "pixel_values" in parameters
    for name in [base.main_input_name] * ("input_ids" not in parameters) + ["pixel_values"] * with_image:
        inputs[name] = _wave(_shape(config, name)).to(device, base.dtype)
    if "decoder_input_ids" in parameters and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _tokens(base).to(device)
    return inputs


def _tokens(base: Any) -> Tensor:
    config = base.config.get_text_config(decoder=True)
    marks = {
        value
        for name, value in base.config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    usable = [token for token in range(config.vocab_size) if token not in marks][:TOKENS]
    if base.config.is_encoder_decoder and isinstance(config.eos_token_id, int):
        usable[-1] = config.eos_token_id  # BART's classification reads its output there
    return torch.tensor([usable])


def _shape(config: Any, name: str) -> tuple[int, ...]:
    """Shape of an image or a sound, in a batch of one."""
    config = getattr(config, "vision_config", config)
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        return (1, getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size))
    if name == "input_features" and hasattr(config, "max_source_positions"):  # Whisper takes no other length
        return (1, config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_features":
        return (1, 64, getattr(config, "feature_projection_input_dim", None) or config.num_mel_bins)
    if name == "input_values" and hasattr(config, "conv_stride"):
        return (1, 64 * math.prod(config.conv_stride))
    raise ValueError(f"it takes {name}, of which the shape is not known")


def _wave(shape: tuple[int, ...]) -> Tensor:
    """Values that differ, without touching the random state."""
    return torch.sin(torch.arange(math.prod(shape), dtype=torch.float32)).view(shape)
