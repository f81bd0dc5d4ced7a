"""Tiny random bases of many architectures, with what each needs beside `tiny_base`'s fields."""

from __future__ import annotations

import torch
from tiny import VOCABULARY
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_OWN_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_PLAIN = (
    "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gpt_neox", "gpt2", "bloom", "falcon", "cohere", "stablelm",
    "starcoder2", "granite", "olmo2", "nemotron", "smollm3", "mamba", "falcon_mamba", "rwkv",
)  # fmt: skip

ARCHITECTURES: dict[str, dict] = {name: {} for name in _PLAIN} | {
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gptj": {**_OWN_NAMES, "rotary_dim": 4, "n_inner": 48},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "jamba": {
        "num_experts": 2, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
        "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "recurrent_gemma": {"lru_width": 32, "conv1d_width": 2, "block_types": ["recurrent", "attention"]},
    "gemma3n_text": {
        "head_dim": 8, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": VOCABULARY, "laurel_rank": 4, "activation_sparsity_pattern": None,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "llama4_text": {"intermediate_size_mlp": 48, "head_dim": 8, "num_local_experts": 2, "interleave_moe_layer_step": 2},
    "mixtral": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "deepseek_v3": {
        **_EXPERTS, **_LATENT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "num_key_value_heads": 4,
    },
}  # fmt: skip
"""Model type -> the fields of its configuration that differ from `tiny_base`'s."""

_WITHOUT_GROUPS = {"phi", "gpt_neox", "gpt2", "opt", "bloom", "mamba", "mamba2", "falcon_mamba", "rwkv", "gptj"}


def tiny_architecture(name: str) -> PreTrainedModel:
    """A random base of this model type in eval mode."""
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
    }  # fmt: skip
    dropped = {"num_key_value_heads"} if name in _WITHOUT_GROUPS else set()
    if name == "gptj":
        dropped |= {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    fields = {key: value for key, value in fields.items() if key not in dropped}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **fields | ARCHITECTURES[name])).eval()


def tiny_vision_language(name: str) -> PreTrainedModel:
    """A random base that sees, whose vision tower has as many layers as its language model: two."""
    text = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
    }  # fmt: skip
    marks = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    configurations = {
        "qwen2_vl": {
            **marks,
            "text_config": text | {"rope_parameters": rope},
            "vision_config": {
                "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            },
        },
        "qwen2_5_vl": {
            **marks,
            "text_config": text | {"rope_parameters": rope},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                "fullatt_block_indexes": [1], "patch_size": 4,
            },
        },
        "qwen3_vl": {
            **marks,
            "text_config": text | {"rope_parameters": rope, "head_dim": 8},
            "vision_config": {
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
                "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4,
            },
        },
        "llava": {
            "image_token_index": 120,
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "siglip_vision_model", **vision, "image_size": 16, "patch_size": 4},
        },
        "gemma3": {
            "image_token_index": 120,
            "text_config": text | {"head_dim": 8},
            "vision_config": {**vision, "image_size": 16, "patch_size": 4},
        },
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **configurations[name])).eval()


def tiny_encoder_decoder(name: str) -> PreTrainedModel:
    """A random encoder-decoder in eval mode, with two layers in its encoder and three in its decoder."""
    layers = {"encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    widths = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "init_std": 0.2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 3}
    fields = {
        "t5": t5,
        "mt5": t5 | {"feed_forward_proj": "gated-gelu"},
        "bart": {**layers, **widths, "max_position_embeddings": 64},
        "marian": {**layers, **widths, "max_position_embeddings": 64},
        "whisper": {**layers, **widths, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
    }[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **tokens, **fields, vocab_size=VOCABULARY)
    auto = AutoModelForSpeechSeq2Seq if name == "whisper" else AutoModelForSeq2SeqLM
    return auto.from_config(config).eval()
