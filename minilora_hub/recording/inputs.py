"""Choose the inputs on which a model with another head is recorded: texts, a picture, a sound, as its task takes them.

A processor is called on a picture or a sound, as users call it, for the arguments, their shapes and their whole
numbers (tokens, masks, grids). The values of pictures and sounds follow from a rule instead (`InputTensor`): they need
no space, and are the same with every version of the processor.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minilora_hub.adapter_folder.companions import companion_files, copy_files, own_tokenizer
from minilora_hub.adapter_folder.names import PROCESSING, TOKENIZING
from minilora_hub.adapter_folder.verification import InputTensor, Prompt
from minilora_hub.recording.logits import PROMPTS, prompt_ids

STEPS = (37, 53, 71)
"""Steps of the values of the pictures, or sounds, in the inputs."""
SECONDS = 1
PICTURE = (160, 120)


def inputs_to_record(model: Any, tokenizer: Path, processor: Path) -> tuple[tuple[Prompt, ...], str | None]:
    """Return the inputs to record, and a note for the author where no picture or sound could be made.

    Args:
        model: an adapted model.
        tokenizer: the folder of its tokenizer.
        processor: the folder of its processor.

    Raises:
        ValueError: the model takes another kind of input.
    """
    from minilora_hub.remote_code.layer_stacks import is_dual_encoder
    from minilora_hub.remote_code.trial_inputs import trial_inputs

    config, main = model.base.config, model.base.main_input_name
    sees_beside = hasattr(config, "vision_config") or is_dual_encoder(model.base)
    if main == "input_ids" and not sees_beside:
        vocabulary = int(model.get_input_embeddings().num_embeddings)
        return prompt_ids(own_tokenizer(tokenizer), vocabulary), None
    trial, note = trial_inputs(model.base), None
    prompts = [_described(trial, step) for step in STEPS]
    try:
        loaded = load_processor(tokenizer, processor)
        if loaded is not None:
            decoder = {name: value for name, value in trial.items() if name == "decoder_input_ids"}
            given = [_processed(loaded, main, prompt) | decoder for prompt in PROMPTS]
            prompts = [_described(tensors, step) for tensors, step in zip(given, STEPS, strict=True)]
    except Exception as error:  # a processor is another library's code, and may need packages that are not here
        reason = " ".join(str(error).split())[:200]
        note = f"recorded without the processor, on other inputs than users have ({type(error).__name__}: {reason})"
    return tuple(prompts), note


def _processed(processor: Any, main: str, text: str) -> dict[str, Any]:
    """Call a processor as its users do."""
    import numpy
    from PIL import Image

    if main in ("input_features", "input_values"):
        extractor = getattr(processor, "feature_extractor", processor)
        sound = numpy.sin(numpy.arange(SECONDS * extractor.sampling_rate) / 20)
        return dict(extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt"))
    picture = Image.new("RGB", PICTURE, "orange")
    if main != "input_ids":
        return dict(processor(picture, return_tensors="pt"))
    if getattr(processor, "chat_template", None):
        content = [{"type": "image", "image": picture}, {"type": "text", "text": text}]
        arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return dict(processor.apply_chat_template([{"role": "user", "content": content}], **arguments))
    mark = getattr(processor, "image_token", "")
    return dict(processor(text=[mark + text], images=picture, return_tensors="pt"))


def load_processor(tokenizer: Path, processor: Path) -> Any | None:
    """Load the processor in a folder, with the tokenizer in another; None where there is none. No code there is run."""
    from transformers import AutoProcessor

    files = companion_files(processor, PROCESSING)
    if not files:
        return None
    with TemporaryDirectory(prefix="minilora-processor-") as scratch:
        copy_files(files, processor, Path(scratch))  # without config.json, as `own_tokenizer` says
        copy_files(companion_files(tokenizer, TOKENIZING), tokenizer, Path(scratch))
        return AutoProcessor.from_pretrained(scratch, trust_remote_code=False)


def _described(tensors: dict[str, Any], step: int) -> dict[str, InputTensor]:
    return {name: _described_one(tensor, step) for name, tensor in tensors.items()}


def _described_one(tensor: Any, step: int) -> InputTensor:
    shape = tuple(tensor.shape)
    if tensor.is_floating_point():
        return InputTensor(shape, step=step)
    values = tuple(int(value) for value in tensor.flatten().tolist())
    return InputTensor(shape, values[:1] if len(set(values)) == 1 else values)
