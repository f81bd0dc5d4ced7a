"""Prompts, and what the shipped adapters answer to them in transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from minilora_hub import DoraForCausalLM, MixLoraForCausalLM
from minilora_hub.bases import resolve_base

SHIPPED = Path(__file__).resolve().parents[3] / "model_cards"
NEW_TOKENS = 24
TEXTS = (
    "Write this date as YYYY-MM-DD: the 3rd of May 1999",
    "What is the capital of France?",
    "def fibonacci(n):",
)


def folder_of(method: str) -> Path:
    return SHIPPED / f"smollm2-135m-{method}"


def base_folder() -> str:
    return str(resolve_base("embedded").path)


@cache
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    turns = ([{"role": "user", "content": text}] for text in TEXTS)
    return [list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)) for turn in turns]


def load(method: str):
    """The base, or a shipped adapter on it, in float32."""
    if method in ("base", "lora"):
        base = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32).eval()
        return base if method == "base" else PeftModel.from_pretrained(base, folder_of("lora")).eval()
    kind = DoraForCausalLM if method == "dora" else MixLoraForCausalLM
    return kind.from_pretrained(folder_of(method), base_model="embedded", dtype=torch.float32)


@cache
def answers(method: str) -> list[list[int]]:
    """The greedy answers to every prompt."""
    return [greedy(load(method), ids) for ids in prompts()]


def greedy(model, ids: list[int], count: int = NEW_TOKENS) -> list[int]:
    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        repetition_penalty=1.0,
    )
    return output[0, len(ids) :].tolist()
