"""What an adapter costs: prefill, decode and a training step, as ratios to the bare base, interleaved in one run.

    python tests/bench/bench_methods.py [--rounds 9] [--json FILE] [--only decode]

Every round runs each variant once, in turn, so that what else the machine does falls on all of them alike; the table
shows the median over the rounds of the ratio to the base in the same round, and its quartiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from peft import LoraConfig, get_peft_model
from reference import reference_mixlora
from tiny import CACHE, fill_adapter
from transformers import AutoModelForCausalLM, DynamicCache

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.compare.found_adapters import shared_copy
from minilora_hub.remote_code.attach import attach
from minilora_hub.remote_code.base_structure import plan_sites

PREFILL, CONTEXT = 512, 64


def lora_of(base, r: int, dropout: float = 0.0) -> torch.nn.Module:
    """Our LoRA path: a DoRA without its magnitude."""
    config = DoraConfig(r=r, lora_dropout=dropout)
    config.use_dora = False
    model = shared_copy(base)
    attach(model, config, plan_sites(model, config))
    return model


def variants(base, r: int, experts: int, active: int, dropout: float = 0.0) -> dict[str, torch.nn.Module]:
    """Every model that is compared, all over one set of base weights."""
    common = {"r": r, "lora_dropout": dropout}
    mixlora_config = MixLoraConfig(num_experts=experts, num_experts_per_tok=active, **common)
    dora = DoraForCausalLM.from_base(shared_copy(base), DoraConfig(**common))
    mixlora = MixLoraForCausalLM.from_base(shared_copy(base), mixlora_config)
    for model in (dora, mixlora):
        fill_adapter(model, scale=0.01)
    peft_config = {"lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **common}
    with tempfile.TemporaryDirectory() as folder:
        reference = reference_mixlora(shared_copy(base), mixlora, Path(folder))
    return {
        "base": shared_copy(base),
        "LoRA": lora_of(base, r, dropout),
        "DoRA": dora,
        "MixLoRA": mixlora,
        "PEFT LoRA": get_peft_model(shared_copy(base), LoraConfig(**peft_config)),
        "PEFT DoRA": get_peft_model(shared_copy(base), LoraConfig(**peft_config, use_dora=True)),
        "mixlora": reference,
    }


@torch.no_grad()
def prefill(model, state, tokens: int = PREFILL) -> float:
    ids = torch.arange(tokens)[None] + 100
    started = time.perf_counter()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - started


@torch.no_grad()
def decode(model, state, tokens: int = 4, context: int = CONTEXT) -> float:
    if "cache" not in state:
        state["cache"] = DynamicCache()
        model(input_ids=torch.arange(context)[None] + 100, use_cache=True, **{CACHE: state["cache"]})
    token = torch.tensor([[42]])
    started = time.perf_counter()
    for _ in range(tokens):
        model(input_ids=token, **{CACHE: state["cache"]}, use_cache=True)
    took = (time.perf_counter() - started) / tokens
    state["cache"].crop(-tokens)
    return took


def training_step(model, state) -> float:
    ids = torch.arange(256).view(2, 128) + 100
    parameters = [p for p in model.parameters() if p.requires_grad]
    started = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    took = time.perf_counter() - started
    for parameter in parameters:
        parameter.grad = None
    return took


def measure(models, work, rounds: int, training: bool) -> dict[str, dict[str, float]]:
    seconds = {name: [] for name in models}
    states = {name: {} for name in models}
    for model in models.values():
        model.train(training)
    for index in range(rounds + 1):
        for name, model in models.items():
            took = work(model, states[name])
            if index:  # the first round warms up
                seconds[name].append(took)
    table = {}
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds.get("base", taken), strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        table[name] = {
            "milliseconds": 1000 * statistics.median(taken),
            "ratio": middle,
            "low": low,
            "high": high,
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--active", type=int, default=2)
    parser.add_argument("--only", choices=["prefill", "decode", "training"])
    parser.add_argument("--variants", nargs="*", help="names of the variants to run besides the base")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32)
    models = variants(base, arguments.rank, arguments.experts, arguments.active)
    if arguments.variants:
        models = {name: model for name, model in models.items() if name in ("base", *arguments.variants)}
    results = {}
    for name, work in (
        ("prefill", prefill),
        ("decode", decode),
        ("training", training_step),
        ("training with dropout", training_step),
    ):
        if arguments.only not in (None, name.partition(" ")[0]):
            continue
        training, chosen = work is training_step, models
        if "dropout" in name:
            chosen = variants(base, arguments.rank, arguments.experts, arguments.active, dropout=0.05)
        if training:  # the bare base has nothing to train: compare with PEFT's LoRA
            compared = ("LoRA", "DoRA", "MixLoRA", "PEFT DoRA")
            chosen = {"base": chosen["PEFT LoRA"]} | {key: chosen[key] for key in compared if key in models}
        results[name] = measure(copy.copy(chosen), work, arguments.rounds, training)
        against = "PEFT's LoRA" if training else "the bare base"
        print(f"\n{name}, against {against} ({arguments.rounds} rounds)")
        for key, row in results[name].items():
            print(
                f"  {key:10} {row['milliseconds']:8.1f} ms  {row['ratio']:5.2f}  [{row['low']:.2f}, {row['high']:.2f}]"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
