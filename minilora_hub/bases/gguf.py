"""A Llama model's GGUF file → an ordinary transformers folder: float32 safetensors, configuration, tokenizer.

Done here, on numpy, and not by transformers' own GGUF loader, for three reasons:

- The same bytes come out on every machine and with every version of transformers, so adapters can name the weights
  they were trained on by a hash.
- The loader does not know the pre-tokenizer that SmolLM2's file asks for (``smollm``: numbers are split into single
  digits *before* words and spaces are cut), and so cuts the white space before a number differently.
- It takes seconds and the memory of one tensor, and needs neither torch nor transformers.

It reads what the embedded model needs: the Llama architecture and a byte-level vocabulary cut the ``smollm`` way.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.errors import BaseModelError

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor

Report = Callable[[str, int, int], None]
"""Progress callback: called with a description, the amount done, and the total."""

# GGUF's names of a layer's tensors → transformers' names in a Llama model.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
CONTROL_TOKEN = 3  # GGUF's token type for special tokens


def write_folder(gguf_file: Path, folder: Path, report: Report) -> None:
    """Write a GGUF file's model and tokenizer as a transformers folder.

    Args:
        gguf_file: a Llama model with its tokenizer.
        folder: an existing folder.
        report: called with the progress in tensors.

    Raises:
        BaseModelError: the file is of another kind, or lacks a value.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    kind = tuple(_field(reader, key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise BaseModelError(f"{gguf_file.name} is a GGUF file of the kind {kind}, only a SmolLM is read here")
    config = _model_config(reader)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_tokenizer(reader, folder)
    _write_weights(reader, folder / "model.safetensors", report)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write indented JSON, the same bytes on every system."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8", newline="\n")


def sha256(path: Path) -> str:
    """Return the hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise BaseModelError(f"the GGUF file has no {key!r}")
    return field.contents()


def _model_config(reader: GGUFReader) -> dict[str, Any]:
    def llama(key: str) -> Any:
        return _field(reader, f"llama.{key}")

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": llama("vocab_size"),
        "hidden_size": llama("embedding_length"),
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": llama("rope.dimension_count"),
        "hidden_act": "silu",
        "max_position_embeddings": llama("context_length"),
        # stored as float32, 9.999999747378752e-06: seven digits give the decimal number that was meant
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": llama("rope.freq_base")},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": _field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id"),
    }


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # GGUF's "smollm": every number character alone, then GPT-2's cut into words, on bytes
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, _field(reader, "tokenizer.ggml.token_type"), strict=True)
    control = [AddedToken(token, normalized=False, special=True) for token, kind in kinds if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(folder / "tokenizer.json"))

    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{role}_token": tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    write_json(folder / "tokenizer_config.json", settings | named)
    (folder / "chat_template.jinja").write_text(
        _field(reader, "tokenizer.chat_template"), encoding="utf-8", newline="\n"
    )


def _write_weights(reader: GGUFReader, path: Path, report: Report) -> None:
    """Write one float32 safetensors file, tensor by tensor, so that the bytes depend on nothing but the GGUF file."""
    import numpy as np
    from gguf.quants import dequantize

    tensors = {_transformers_name(tensor.name): tensor for tensor in reader.tensors}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items()):
        shape = [int(size) for size in reversed(tensor.shape)]  # GGUF names the fastest axis first
        end = offset + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for done, (_, tensor) in enumerate(sorted(tensors.items()), start=1):
            weight = _unpermute(dequantize(tensor.data, tensor.tensor_type), tensor, reader)
            file.write(np.ascontiguousarray(weight, dtype="<f4").data)
            report("Converting to safetensors", done, len(tensors))


def _transformers_name(name: str) -> str:
    first, *rest = name.split(".")
    if first == "blk":
        return f"model.layers.{rest[0]}.{LAYER_TENSORS[rest[1]]}.weight"
    return f"{OTHER_TENSORS[first]}.weight"


def _unpermute(weight: Any, tensor: ReaderTensor, reader: GGUFReader) -> Any:
    """Put the rows of a query or key projection back into transformers' order.

    GGUF rotates neighbouring rows of a head, transformers rows half a head apart.
    """
    counts = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    kind = tensor.name.split(".")[-2]
    if kind not in counts:
        return weight
    heads = _field(reader, counts[kind])
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # (heads, head_dim / 2, 2, in)
    return pairs.swapaxes(1, 2).reshape(weight.shape)  # (heads · head_dim, in)
