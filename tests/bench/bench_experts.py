"""Time an adapter on stacked experts against the bare base and PEFT's LoRA on the same parameters: CPU time, medians.

python tests/bench/bench_experts.py --rounds 7 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM
from minilora_hub.training import lora_model

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def base() -> Any:
    """A random Qwen3-MoE: 4 layers of 16 experts, 4 active, 512 wide."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=1024, hidden_size=512, moe_intermediate_size=384, intermediate_size=1024,
        num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, head_dim=64, num_experts=16,
        num_experts_per_tok=4, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def models() -> dict[str, Any]:
    alone: dict[str, Any] = {"target_modules": [], "target_parameters": EXPERTS}
    return {
        "base": base(),
        "LoRA": lora_model.LoraForCausalLM.from_base(base(), lora_model.LoraConfig(r=16, **alone)).eval(),
        "DoRA": DoraForCausalLM.from_base(base(), DoraConfig(r=16, **alone)).eval(),
        "PEFT LoRA": get_peft_model(base(), LoraConfig(r=16, lora_alpha=32, **alone)).eval(),
    }


def seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    ids, some = torch.randint(1, 1024, (1, 256)), models()

    def forward(model: Any, length: int) -> None:
        with torch.no_grad():
            for _ in range(1 if length > 1 else 8):
                model(input_ids=ids[:, :length], use_cache=False)

    def step(model: Any) -> None:
        model.train()(input_ids=ids, labels=ids).loss.backward()
        model.eval()

    work: dict[str, Callable[[Any], None]] = {
        "256 tokens": lambda model: forward(model, 256),
        "one token": lambda model: forward(model, 1),
        "training step": step,
    }
    print("| work |", " | ".join(some), "|\n| --- |", " | ".join("---:" for _ in some), "|")
    for name, do in work.items():
        rounds = [
            {kind: seconds(lambda m=model, d=do: d(m)) for kind, model in some.items()} for _ in range(given.rounds + 1)
        ][1:]
        first = "LoRA" if name == "training step" else "base"  # a step of the bare base trains all of it
        ratios = [statistics.median(each[kind] / each[first] for each in rounds) for kind in some]
        print(f"| {name} |", " | ".join(f"{ratio:.2f}" for ratio in ratios), "|", flush=True)


if __name__ == "__main__":
    main()
