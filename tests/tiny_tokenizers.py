"""Small tokenizers of the kinds that bases have, built as transformers builds the real ones, with their chat templates.

Their vocabularies hold a few words. What is kept of the originals is what changes token ids at a boundary: normalizers
and pre-tokenizers, where a leading space comes from, which special tokens strip white space, who writes BOS, and how
the template ends an answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

WORDS = (
    " yes",
    "yes",
    "no",
    " the",
    " sky",
    " is",
    " blue",
    " [",
    "](",
    "][",
    "INST",
    "user",
    "assistant",
    "model",
    "\n\n",
)
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V1 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- ' ' + message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role }}{%- if message.content %}{{- '\\n' + message.content }}{%- endif %}"
    "{%- for tool_call in message.tool_calls or [] %}"
    '{{- \'\\n<tool_call>\\n{"name": "\' + tool_call.function.name + \'", "arguments": \' }}'
    "{{- tool_call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}{%- endfor %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def _pieces(space: str, newline: str, singles: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges in which each of `WORDS` is one token, built up from its left."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        text = word.replace(" ", space).replace("\n", newline)
        for end in range(1, len(text)):
            merges[text[:end], text[end]] = None
    names = dict.fromkeys([*singles, *(left + right for left, right in merges)])
    return {name: index for index, name in enumerate(names)}, list(merges)


def _sentencepiece(*specials: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Characters, a piece for each byte, and "▁" for a space."""
    characters = [chr(code) for code in range(33, 127)]
    return _pieces("▁", "\n", [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", *characters])


def _byte_level() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return _pieces("Ġ", "Ċ", sorted(pre_tokenizers.ByteLevel.alphabet()))


def _llama_file(template: str, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """As the tokenizer.json of Llama 2 and Mistral: a space is put before every piece between special tokens."""
    vocab, merges = _sentencepiece("<unk>", "<s>", "</s>", *extra)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = template
    return fast


def _llama_class(template: str, legacy: bool) -> LlamaTokenizer:
    """As transformers' own class builds it: a space at the start (legacy: of every piece between special tokens)."""
    vocab, merges = _sentencepiece("<unk>", "<s>", "</s>")
    return LlamaTokenizer(vocab=vocab, merges=merges, legacy=legacy, add_bos_token=True, chat_template=template)


def _llama3() -> PreTrainedTokenizerFast:
    vocab, merges = _byte_level()
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens(specials)
    begin = (specials[0], tokenizer.token_to_id(specials[0]))
    template = processors.TemplateProcessing(single=f"{begin[0]} $A", pair=None, special_tokens=[begin])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
    fast.chat_template = LLAMA3
    return fast


def _qwen25() -> Qwen2Tokenizer:
    vocab, merges = _byte_level()
    qwen = Qwen2Tokenizer(vocab=vocab, merges=merges, chat_template=QWEN25)
    qwen.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return qwen


def _gemma() -> GemmaTokenizer:
    vocab, merges = _sentencepiece("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    gemma = GemmaTokenizer(vocab=vocab, merges=merges, add_bos_token=True, chat_template=GEMMA)
    gemma.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    return gemma


def _phi3() -> PreTrainedTokenizerFast:
    """Llama's, whose turn tokens swallow the white space after them."""
    names = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    phi = _llama_file(PHI3, names)
    phi.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    tokens = [AddedToken(name, rstrip=name != "<|endoftext|>", normalized=False, special=True) for name in names]
    phi.add_special_tokens({"eos_token": tokens[0], "additional_special_tokens": tokens[1:]})
    return phi


def _embedded() -> PreTrainedTokenizerFast:
    """SmolLM2's own, which lies beside the shipped adapters."""
    return AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "model_cards" / "smollm2-135m-lora")


KINDS: dict[str, Callable] = {
    "llama2": lambda: _llama_file(LLAMA2),
    "llama2-class": lambda: _llama_class(LLAMA2, legacy=False),
    "llama2-legacy": lambda: _llama_class(LLAMA2, legacy=True),
    "mistral-v1": lambda: _llama_file(MISTRAL_V1),
    "mistral-v1-class": lambda: _llama_class(MISTRAL_V1, legacy=False),
    "mistral-v3": lambda: _llama_file(MISTRAL_V3, ("[INST]", "[/INST]")),
    "llama3": _llama3,
    "qwen2.5": _qwen25,
    "gemma": _gemma,
    "phi3": _phi3,
    "embedded": _embedded,
}
END_OF_TURN = {"llama3": "<|eot_id|>", "qwen2.5": "<|im_end|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}
END_OF_TURN |= {name: "</s>" for name in KINDS if name.startswith(("llama2", "mistral"))} | {"embedded": "<|im_end|>"}


@cache
def tokenizer_of(kind: str):
    """Return the tokenizer of a kind; one for all tests, so leave it as it is."""
    return KINDS[kind]()
