"""Tiny stand-ins for models and tokenizers: everything here starts in a second."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaMLP

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
            "eos_token_id": 257,  # "<|user|>"; it and the tokenizer's end are unreachable below: answers end by length
            "pad_token_id": 0,
            **fields,
        }
    )
    model = LlamaForCausalLM(config).eval()
    if not config.tie_word_embeddings:
        with torch.no_grad():
            model.lm_head.weight[256:258] = 0  # logit 0, and the best of 259 random ones is never below that
    return model


def save_base_and_adapters(folder: Path, noise: float = 0.3) -> tuple[Path, list[Path]]:
    """Save a tiny base and one adapter of each kind, every tensor random, as folders; `noise` is how far from it."""
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
                    parameter.add_(noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(folder / name)
    return base, [folder / name for name in fresh]


class ScriptedBase(nn.Module):
    """Rows of the bare base babble and never end; a row with an adapter says the visitor's words back and ends.

    What a row does is decided by its adapter's own output, so that the adapters are real ones. A row whose prompt
    starts with "explode" computes NaN after five tokens, if it has an adapter; one that starts with "destroy" breaks
    the forward of all rows.
    """

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.config = LlamaConfig(
            num_hidden_layers=1, hidden_size=8, num_attention_heads=1, max_position_embeddings=512
        )
        layer = nn.Module()
        layer.speak = nn.Linear(8, 8, bias=False)
        layer.mlp = LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=1))
        self.layers = nn.ModuleList([layer])
        nn.init.zeros_(layer.speak.weight)
        self.delay = delay
        self.explosion, self.destruction = byte_tokenizer()(["explode", "destroy"])["input_ids"]

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=None, return_dict=None):
        time.sleep(self.delay)
        count = len(input_ids)
        cache = past_key_values or ScriptedCache([[] for _ in range(count)])
        masks = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        parrots = self.layers[0].speak(torch.ones(count, 1, 8)).abs().sum(dim=(1, 2)) > 0
        logits = torch.zeros(count, input_ids.shape[1], 259)
        for row, seen in enumerate(cache.rows):
            seen += input_ids[row][masks[row].bool()].tolist()
            if 258 not in seen:  # a piece of a long prompt
                continue
            start, end = seen.index(257) + 1, seen.index(256)
            said = len(seen) - seen.index(258) - 1
            if not parrots[row]:
                logits[row, -1, 65 + (7 * said + len(seen)) % 26] = 1.0
            elif said == 5 and seen[start : start + 7] == self.destruction:
                raise RuntimeError("<b>boom</b>")
            elif said == 5 and seen[start : start + 7] == self.explosion:
                logits[row] = float("nan")
            else:
                logits[row, -1, seen[min(start + said, end)]] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=cache)


class ScriptedCache:
    """The tokens each row has seen."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.rows = [self.rows[index] for index in indices.tolist()]


def save_parrots(folder: Path, names: dict[str, str]) -> list[Path]:
    """Adapters for a `ScriptedBase`: {name: "dora" or "mixlora"}, each of which makes its rows parrots."""
    from minilora_hub.remote_code.adapter_files import write_adapter
    from minilora_hub.remote_code.attach import expected_tensors
    from minilora_hub.remote_code.base_structure import plan_sites
    from minilora_hub.remote_code.configuration_minilora import DoraConfig, MixLoraConfig

    for name, method in names.items():
        config = DoraConfig(r=2) if method == "dora" else MixLoraConfig(r=2, num_experts=2)
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
        shapes = expected_tensors(config, plan_sites(ScriptedBase(), config))
        tensors = {tensor: torch.ones(shape) for tensor, shape in shapes.items()}
        write_adapter(folder / name / "adapter_model.safetensors", tensors)
    return [folder / name for name in names]
