"""Tiny random models under the names that PEFT's tests load from the Hub, in a local cache of `huggingface_hub`.

With ``HF_HUB_CACHE`` at that cache and ``HF_HUB_OFFLINE=1``, `from_pretrained` finds them as if they had been
downloaded. Each has the architecture of the model it stands for, other weights, and a tokenizer of single bytes.
Trained adapters and data sets have no stand-in: the tests that need them fail, with and without our method.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedTokenizerFast

REVISION = "0" * 40
VOCABULARY = 300

LLAMA_LIKE = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
OPT = {
    "hidden_size": 16,
    "ffn_dim": 64,
    "word_embed_proj_dim": 16,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
GPT2 = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512}
GPTJ = GPT2 | {"rotary_dim": 4}
BERT = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "num_attention_heads": 4}
BART = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 512,
}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}

# Name on the Hub, without the organisation -> (model type, class, fields that differ).
MODELS = {
    "tiny-random-OPTForCausalLM": ("opt", "OPTForCausalLM", OPT),
    "opt-125m": ("opt", "OPTForCausalLM", OPT | {"num_hidden_layers": 12}),
    "opt-350m": ("opt", "OPTForCausalLM", OPT | {"num_hidden_layers": 12}),
    "tiny-random-gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "gpt2": ("gpt2", "GPT2LMHeadModel", GPT2),
    "tiny-random-GPT2LMHeadModel": ("gpt2", "GPT2LMHeadModel", GPT2),
    "tiny-random-GPTJForCausalLM": ("gptj", "GPTJForCausalLM", GPTJ),
    "tiny-random-GPTNeoXForCausalLM": ("gpt_neox", "GPTNeoXForCausalLM", BERT),
    "tiny-random-LlamaForCausalLM": ("llama", "LlamaForCausalLM", LLAMA_LIKE),
    "tiny-random-MistralForCausalLM": ("mistral", "MistralForCausalLM", LLAMA_LIKE),
    "tiny-dummy-qwen2": ("qwen2", "Qwen2ForCausalLM", LLAMA_LIKE),
    "Qwen2-0.5B": ("qwen2", "Qwen2ForCausalLM", LLAMA_LIKE),
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", "Qwen2ForCausalLM", LLAMA_LIKE),
    "tiny-Qwen3ForCausalLM": ("qwen3", "Qwen3ForCausalLM", LLAMA_LIKE),
    "tiny-random-Gemma3ForCausalLM": ("gemma3_text", "Gemma3ForCausalLM", LLAMA_LIKE | {"head_dim": 32}),
    "tiny-random-BloomForCausalLM": ("bloom", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bloomz-560m": ("bloom", "BloomForCausalLM", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "Mixtral-tiny": ("mixtral", "MixtralForCausalLM", LLAMA_LIKE | {"num_local_experts": 4}),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", "Qwen3MoeForCausalLM", LLAMA_LIKE | EXPERTS),
    "tiny-qwen3-moe": ("qwen3_moe", "Qwen3MoeForCausalLM", LLAMA_LIKE | EXPERTS),
    "tiny-GptOssForCausalLM": ("gpt_oss", "GptOssForCausalLM", LLAMA_LIKE | {"head_dim": 4, "num_local_experts": 4}),
    "tiny-Llama4ForCausalLM": (
        "llama4_text",
        "Llama4ForCausalLM",
        LLAMA_LIKE | {"head_dim": 4, "intermediate_size_mlp": 64, "num_local_experts": 4},
    ),
    "tiny-LlamaForSequenceClassification-3.2": ("llama", "LlamaForSequenceClassification", LLAMA_LIKE),
    "tiny-random-t5": ("t5", "T5ForConditionalGeneration", T5),
    "flan-t5-small": ("t5", "T5ForConditionalGeneration", T5),
    "flan-t5-base": ("t5", "T5ForConditionalGeneration", T5),
    "tiny-random-T5ForConditionalGeneration": ("t5", "T5ForConditionalGeneration", T5),
    "tiny-random-T5ForConditionalGeneration-calibrated": ("t5", "T5ForConditionalGeneration", T5),
    "tiny-random-BartForConditionalGeneration": ("bart", "BartForConditionalGeneration", BART),
    "tiny-random-BertModel": ("bert", "BertModel", BERT),
    "tiny-random-BertForSequenceClassification": ("bert", "BertForSequenceClassification", BERT),
    "tiny-random-RobertaModel": ("roberta", "RobertaModel", BERT),
    "tiny-random-RobertaForSequenceClassification": ("roberta", "RobertaForSequenceClassification", BERT),
    "tiny-random-DebertaModel": ("deberta", "DebertaModel", BERT),
    "tiny-random-DebertaV2Model": ("deberta-v2", "DebertaV2Model", BERT),
    "tiny-random-ResNetForImageClassification": (
        "resnet",
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
    ),
}
ORGANISATIONS = {
    "opt-350m": ["facebook"],
    "opt-125m": ["facebook", "peft-internal-testing"],
    "gpt2": ["openai-community"],
    "bloomz-560m": ["bigscience"],
    "flan-t5-small": ["google"],
    "flan-t5-base": ["google"],
    "Qwen2-0.5B": ["Qwen"],
}
TESTING = ["peft-internal-testing", "hf-internal-testing", "trl-internal-testing"]


def write_cache(cache: Path) -> None:
    """Write every model under every name into `cache`, a folder for ``HF_HUB_CACHE``. What is there is kept."""
    for name, (kind, class_name, fields) in MODELS.items():
        first, *others = [cache / f"models--{org}--{name}" for org in ORGANISATIONS.get(name, TESTING)]
        if not (first / "refs/main").exists():
            _write_model(first / "snapshots" / REVISION, kind, class_name, fields)
            (first / "refs").mkdir(exist_ok=True)
            (first / "refs/main").write_text(REVISION)
        for other in others:
            if not other.exists():
                other.symlink_to(first.name)


def _write_model(folder: Path, kind: str, class_name: str, fields: dict) -> None:
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(special | {"initializer_range": 0.2} | fields))
    getattr(transformers, class_name)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, after three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
