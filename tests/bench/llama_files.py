"""GGUF files for llama.cpp: the embedded base in float32, and a LoRA on it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from peft import LoraConfig
from safetensors.torch import load_file

from minilora_hub.bases.gguf import LAYER_TENSORS


def write_float32(source: Path, out: Path) -> None:
    """Write a GGUF file's model with its tensors in float32: the numbers that the embedded base has."""
    reader = GGUFReader(source)
    writer = GGUFWriter(out, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, inner[-1] if kind == GGUFValueType.ARRAY else None)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]), raw_dtype=GGMLQuantizationType.F32)
    _close(writer)


def write_lora(adapter: Path, heads: tuple[int, int], out: Path) -> None:
    """Write a LoRA in PEFT's format as llama.cpp reads it.

    Args:
        adapter: its folder.
        heads: the base's heads of queries, and of keys.
        out: the file.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    writer = GGUFWriter(out, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(config.lora_alpha))
    names = {path: name for name, path in LAYER_TENSORS.items()}
    for key, values in sorted(load_file(adapter / "adapter_model.safetensors").items()):
        layer, path, leaf = re.fullmatch(r".*\.layers\.(\d+)\.(.*)\.(lora_[AB])\.weight", key).groups()  # type: ignore[union-attr]
        array = values.float().numpy()
        if leaf == "lora_B" and path.endswith(("q_proj", "k_proj")):
            array = _halves_in_pairs(array, heads[path.endswith("k_proj")])
        writer.add_tensor(f"blk.{layer}.{names[path]}.weight.{leaf.lower()}", array)
    _close(writer)


def _halves_in_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows as llama.cpp rotates them: a head's two halves in turn."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
