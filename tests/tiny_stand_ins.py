"""Tiny stand-ins for models and tokenizers, and a page over them: everything here starts in a second.

Run as a script, it serves the page and answers ``forwards`` on stdin with the engine's counter, for the browser tests.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIALS = ("<|end|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: one token a byte, so every emoji is torn into four."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT if chat else None
    return fast


def tiny_llama(seed: int = 0, **fields) -> LlamaForCausalLM:
    """A random Llama of two layers over the byte tokenizer's 259 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 259,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,  # far from uniform: few near-ties between tokens
            "bos_token_id": None,
            "eos_token_id": 257,  # "<|user|>", whose row is made unreachable below: its answers end by length
            "pad_token_id": 0,
            **fields,
        }
    )
    model = LlamaForCausalLM(config).eval()
    if not config.tie_word_embeddings:
        with torch.no_grad():
            model.lm_head.weight[257] = 0  # logit 0, and the best of 259 random ones is never below that
    return model


def save_base_and_adapters(folder: Path) -> tuple[Path, list[Path]]:
    """Save a tiny base and one adapter of each kind, every tensor random, as folders."""
    from peft import LoraConfig, get_peft_model

    from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM

    base = folder / "base"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    fresh = {
        "mix": MixLoraForCausalLM.from_base(
            tiny_llama(), MixLoraConfig(r=4, num_experts=4, base_model_name_or_path=str(base))
        ),
        "dora": DoraForCausalLM.from_base(tiny_llama(), DoraConfig(r=4, base_model_name_or_path=str(base))),
        "lora": get_peft_model(
            tiny_llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        ),
    }
    for name, model in fresh.items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(folder / name)
    return base, [folder / name for name in fresh]


class Parrot(nn.Module):
    """Says the visitor's words back and ends; raises after a few tokens of a prompt that starts with "explode"."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.delay = delay
        self.config = SimpleNamespace(max_position_embeddings=512)

    def forward(self, input_ids, past_key_values=None, use_cache=None, return_dict=None):
        time.sleep(self.delay)
        seen = [*(past_key_values or []), *input_ids[0].tolist()]
        logits = torch.zeros(1, input_ids.shape[1], 259)
        if 258 not in seen:  # a piece of a long prompt
            return SimpleNamespace(logits=logits, past_key_values=seen)
        start, end = seen.index(257) + 1, seen.index(256)
        said = len(seen) - seen.index(258) - 1
        if said == 5 and seen[start : start + 7] == byte_tokenizer()("explode")["input_ids"]:
            raise RuntimeError("<b>boom</b>")
        logits[0, -1, seen[min(start + said, end)]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=seen)


def main() -> None:
    """Serve a page: a slow random base that never ends, and two parrots."""
    from minilora_hub.compare.engine import Column, CompareEngine
    from minilora_hub.demo.ui import build_demo, launch

    columns = [
        Column("parrot-dora", "DoRA", Parrot(0.01), 12_345, "r 4"),
        Column("parrot-mix", "MixLoRA", Parrot(0.01), 4_900_000, "r 16, 8 experts, 2 active"),
    ]
    engine = CompareEngine(tiny_llama(), columns, tokenizer=byte_tokenizer())
    engine.columns[0].model.register_forward_pre_hook(lambda module, args: time.sleep(0.02))
    demo = build_demo(engine, title="Same prompt, three answers", examples=["Hello 👋 there", "Ünïcödé"])
    address = launch(demo, host="127.0.0.1", port=int(sys.argv[1]), block=False)
    print(address, flush=True)
    for line in sys.stdin:
        if line.strip() == "forwards":
            print(engine.forwards, flush=True)


if __name__ == "__main__":
    main()
