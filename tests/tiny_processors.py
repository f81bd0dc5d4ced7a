"""Tiny random bases in folders with their tokenizers and processors, one for each kind of head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny_heads
import tiny_stand_ins
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

CLASSES = {"id2label": {0: "bad", 1: "good", 2: "odd"}, "label2id": {"bad": 0, "good": 1, "odd": 2}}
KINDS = {
    "AutoModelForSequenceClassification": "bert",
    "AutoModelForTokenClassification": "roberta",
    "AutoModelForQuestionAnswering": "bert",
    "AutoModelForMaskedLM": "bert",
    "AutoModelForSeq2SeqLM": "t5",
    "AutoModelForSpeechSeq2Seq": "whisper",
    "AutoModelForCTC": "wav2vec2",
    "AutoModelForAudioClassification": "wav2vec2",
    "AutoModelForImageClassification": "vit",
    "AutoModelForZeroShotImageClassification": "clip",
    "AutoModelForImageTextToText": "llava",
    "AutoModel": "bert",
}
"""Auto class -> an architecture that it loads."""
SIZE = {"height": 16, "width": 16}
IMAGE_CHAT = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|end|>{% endfor %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the marks that pipelines and processors ask for."""
    made = tiny_stand_ins.byte_tokenizer(chat=False)
    made.add_special_tokens({"pad_token": "<pad>", "mask_token": "<mask>", "extra_special_tokens": ["<image>"]})
    made.model_max_length = 60
    return made


def processor_of(name: str) -> Any:
    """What makes inputs of an architecture from texts, images and sounds."""
    bytes_of = {sign: place for place, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    if name in ("vit", "dinov2"):
        return transformers.ViTImageProcessor(size=SIZE)
    if name == "clip":
        texts = {**{f"{sign}</w>": place for sign, place in bytes_of.items()}, "<|startoftext|>": 256}
        seer = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
        vocabulary = {**texts, "<|endoftext|>": 257} | {sign: 258 + place for sign, place in bytes_of.items()}
        return transformers.CLIPProcessor(seer, transformers.CLIPTokenizer(vocabulary, [], model_max_length=60))
    if name == "llava":
        seer = transformers.SiglipImageProcessor(size=SIZE)
        return transformers.LlavaProcessor(
            seer, byte_tokenizer(), patch_size=4, vision_feature_select_strategy="full", chat_template=IMAGE_CHAT,
            image_token="<image>",
        )  # fmt: skip
    if name == "wav2vec2":
        signs = {sign: place for place, sign in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEFGHIJKLMNOP"])}
        file = Path("vocab.json").resolve()
        file.write_text(json.dumps(signs))
        tokenizer = transformers.Wav2Vec2CTCTokenizer(str(file))
        return transformers.Wav2Vec2Processor(transformers.Wav2Vec2FeatureExtractor(), tokenizer)
    if name == "whisper":
        listener = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1, hop_length=500)
        vocabulary = {**bytes_of, "<|endoftext|>": 256}
        return transformers.WhisperProcessor(listener, transformers.WhisperTokenizer(vocabulary, []))
    return byte_tokenizer()


def configuration_of(name: str) -> Any:
    """The configuration of an architecture, with a vocabulary that its tokenizer fits into."""
    if name == "llava":
        text = {**tiny_heads.CONFIGURATIONS["llama"], "vocab_size": 600, "max_position_embeddings": 512}
        vision = {**tiny_heads.CONFIGURATIONS["vit"], "model_type": "siglip_vision_model"}
        mark = byte_tokenizer().convert_tokens_to_ids("<image>")
        return AutoConfig.for_model(
            name, text_config={"model_type": "llama", **text}, vision_config=vision, image_token_id=mark,
            image_token_index=mark, vision_feature_select_strategy="full",
        )  # fmt: skip
    fields: dict[str, Any] = dict(tiny_heads.CONFIGURATIONS[name])
    if "text_config" in fields:
        fields["text_config"] = fields["text_config"] | {"vocab_size": 600, "eos_token_id": 257, "bos_token_id": 256}
    elif name == "whisper":
        fields |= {"vocab_size": 600, "eos_token_id": 256, "bos_token_id": 256, "pad_token_id": 256}
    elif "pad_token_id" in fields:
        fields["vocab_size"] = 600
    return AutoConfig.for_model(name, **fields)


def write_base(auto_name: str, folder: Path, name: str | None = None) -> Path:
    """Write a base as it is pretrained: a classifier's without its head."""
    name = name or KINDS[auto_name]
    torch.manual_seed(0)
    fresh = tiny_heads.has_fresh_head(auto_name) and auto_name != "AutoModelForCTC"
    auto = transformers.AutoModel if fresh else getattr(transformers, auto_name)
    model = auto.from_config(configuration_of(name))
    if name == "whisper":
        model.generation_config.max_length = 30
    model.save_pretrained(folder)
    processor_of(name).save_pretrained(folder)
    return folder


def chat_processor(kind: str, ends: bool = True) -> Any:
    """A processor of chats with pictures that is made without torchvision; `ends`: its template ends each turn."""
    marks = {"llava": "<image>", "gemma3": "<soi>", "idefics3": "<image>", "qwen2_vl": "<|vision_start|><|image_pad|>"}
    chat = IMAGE_CHAT.replace("<image>", marks[kind])
    chat = chat if ends else chat.replace("<|end|>", "")
    if kind == "llava":
        made = processor_of(kind)
        made.chat_template = chat
        return made
    rows = [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    extra = ["<soi>", "<eoi>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows]
    extra += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>", *extra]})
    tokenizer.model_max_length = 999
    if kind == "gemma3":
        for name, mark in (("boi_token", "<soi>"), ("eoi_token", "<eoi>"), ("image_token", "<image>")):
            setattr(tokenizer, name, mark)
            setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
        seer: Any = transformers.Gemma3ImageProcessorPil(size=SIZE)
        return transformers.Gemma3Processor(seer, tokenizer, image_seq_length=4, chat_template=chat)
    if kind == "idefics3":
        sizes = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
        seer = transformers.Idefics3ImageProcessorPil(**sizes)
        return transformers.Idefics3Processor(seer, tokenizer, image_seq_len=4, chat_template=chat)
    made = transformers.Qwen2VLProcessor.__new__(transformers.Qwen2VLProcessor)
    made.check_argument_for_proper_class = lambda *_: None  # its processor of videos needs torchvision
    sizes = {"shortest_edge": 64, "longest_edge": 1024}
    seer = transformers.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size=sizes)
    made.__init__(seer, tokenizer, None, chat_template=chat)
    return made
