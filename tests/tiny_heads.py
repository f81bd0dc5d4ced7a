"""Tiny random bases with heads of every kind, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tiny import VOCABULARY
from transformers import AutoConfig, AutoModel

_WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
_TEXT = {**_WIDTHS, **_TOKENS, "max_position_embeddings": 64, "initializer_range": 0.2}
_IMAGE = {**_WIDTHS, "image_size": 16, "patch_size": 4, "initializer_range": 0.2}
_TWO_PARTS = {
    **_TOKENS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
    "init_std": 0.2,
}  # fmt: skip
_SOUND = {
    **_WIDTHS, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2, "mask_time_length": 2,
    "num_feat_extract_layers": 2, "layerdrop": 0.0,
}  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "bert": _TEXT,
    "roberta": _TEXT,
    "distilbert": {**_TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "initializer_range": 0.2},
    "electra": {**_TEXT, "embedding_size": 32},
    "xlm-roberta": _TEXT,
    "camembert": _TEXT,
    "mpnet": _TEXT,
    "deberta-v2": {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
    "ernie": _TEXT,
    "hubert": _SOUND,
    "unispeech": _SOUND,
    "deit": {**_IMAGE, "architectures": ["DeiTForImageClassification"]},  # of the two it has
    "beit": {**_IMAGE, "use_relative_position_bias": False},
    "dinov3_vit": {**_IMAGE, "num_register_tokens": 0},
    "pegasus": {**_TWO_PARTS, "max_position_embeddings": 64},
    "mbart": {**_TWO_PARTS, "max_position_embeddings": 64},
    "modernbert": {**_TEXT, "cls_token_id": 1, "sep_token_id": 2},
    "llama": {**_TEXT, "num_key_value_heads": 2},
    "qwen3": {**_TEXT, "num_key_value_heads": 2, "head_dim": 8},
    "t5": {
        **_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0,
    },
    "bart": {**_TWO_PARTS, "max_position_embeddings": 64},
    "whisper": {**_TWO_PARTS, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32},
    "wav2vec2": _SOUND,
    "vit": _IMAGE,
    "dinov2": _IMAGE,
    "clip": {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16},
    "siglip": {"text_config": {**_TEXT, "projection_size": 32}, "vision_config": _IMAGE},
}  # fmt: skip
CASES = (
    ("bert", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForSequenceClassification"),
    ("llama", "AutoModelForTokenClassification"),
    ("bert", "AutoModelForQuestionAnswering"),
    ("bert", "AutoModel"),
    ("t5", "AutoModelForSeq2SeqLM"),
    ("whisper", "AutoModelForSpeechSeq2Seq"),
    ("vit", "AutoModelForImageClassification"),
    ("wav2vec2", "AutoModelForCTC"),
    ("clip", "AutoModelForZeroShotImageClassification"),
    ("roberta", "AutoModelForSequenceClassification"),
    ("distilbert", "AutoModelForTokenClassification"),
    ("modernbert", "AutoModelForSequenceClassification"),
    ("modernbert", "AutoModelForMaskedLM"),
    ("qwen3", "AutoModelForQuestionAnswering"),
    ("bart", "AutoModelForSequenceClassification"),
    ("bart", "AutoModelForSeq2SeqLM"),
    ("t5", "AutoModel"),
    ("whisper", "AutoModelForAudioClassification"),
    ("wav2vec2", "AutoModelForAudioClassification"),
    ("dinov2", "AutoModelForImageClassification"),
    ("dinov2", "AutoModel"),
    ("siglip", "AutoModel"),
)
"""(architecture, Auto class); the first ten cover every class."""
MORE = (
    ("electra", "AutoModelForSequenceClassification"),
    ("xlm-roberta", "AutoModelForTokenClassification"),
    ("camembert", "AutoModelForSequenceClassification"),
    ("mpnet", "AutoModel"),
    ("deberta-v2", "AutoModelForSequenceClassification"),
    ("ernie", "AutoModelForQuestionAnswering"),
    ("hubert", "AutoModelForCTC"),
    ("unispeech", "AutoModelForCTC"),
    ("deit", "AutoModelForImageClassification"),
    ("beit", "AutoModelForImageClassification"),
    ("dinov3_vit", "AutoModel"),
    ("pegasus", "AutoModelForSeq2SeqLM"),
    ("mbart", "AutoModelForSeq2SeqLM"),
)
"""Further ones for the table of architectures."""
FRESH = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "CTC", "AudioC", "ImageClassification")


def has_fresh_head(auto_name: str) -> bool:
    """Whether `checkpoint` writes a base without the head that this Auto class wants."""
    return any(kind in auto_name for kind in FRESH) and "ZeroShot" not in auto_name


def checkpoint(name: str, auto_name: str, folder: Any) -> str:
    """Write a random base; a classifier's without its head, as a pretrained model is."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **CONFIGURATIONS[name])
    auto = AutoModel if has_fresh_head(auto_name) else getattr(transformers, auto_name)
    auto.from_config(config).save_pretrained(folder)
    return str(folder)


def tiny_head(name: str, auto_name: str) -> Any:
    """A random base in eval mode."""
    torch.manual_seed(0)
    return getattr(transformers, auto_name).from_config(AutoConfig.for_model(name, **CONFIGURATIONS[name])).eval()


def inputs_of(name: str, auto_name: str) -> dict[str, torch.Tensor]:
    """Inputs of a batch of two, without labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=generator)
    ids[:, -1] = 2
    image = torch.randn(2, 3, 16, 16, generator=generator)
    two = {"decoder_input_ids": ids.flip(1)}
    if name == "whisper":
        sound = {"input_features": torch.randn(2, 8, 32, generator=generator)}
        return sound | (two if auto_name == "AutoModelForSpeechSeq2Seq" else {})
    if CONFIGURATIONS[name] is _SOUND:
        return {"input_values": torch.randn(2, 600, generator=generator)}
    if "image_size" in CONFIGURATIONS[name]:
        return {"pixel_values": image}
    if name in ("clip", "siglip"):
        return {"input_ids": ids, "pixel_values": image}
    return {"input_ids": ids} | (two if name in ("t5", "pegasus", "mbart") else {})


def labels_of(auto_name: str, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Labels that fit `inputs_of`, for a head of three classes."""
    if "QuestionAnswering" in auto_name:
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    if "TokenClassification" in auto_name:
        return {"labels": inputs["input_ids"] % 3}
    if "Seq2Seq" in auto_name or "CTC" in auto_name:
        return {"labels": torch.randint(3, 30, (2, 5), generator=torch.Generator().manual_seed(4))}
    if "MaskedLM" in auto_name:
        return {"labels": inputs["input_ids"]}
    return {"labels": torch.tensor([0, 2])} if "Classification" in auto_name and "Zero" not in auto_name else {}


def values_of(outputs: Any) -> torch.Tensor:
    """The output that is compared."""
    names = ("logits", "start_logits", "logits_per_image", "last_hidden_state")
    return outputs[next(name for name in names if name in outputs)]
