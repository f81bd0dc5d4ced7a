"""What bounds each kind of work, and how far it is from the bound: memory, arithmetic, Python.

    python tests/bench/bench_bounds.py [--json FILE]

The machine's limits are measured first: reading a large tensor, and a large product. Decoding reads every weight once
a step, so its bound is bytes over bandwidth; prefill is bound by arithmetic. What Python and the start of kernels cost
is the CPU time of one thread on a model of as many layers and next to no width, less that of its bare base.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench_bank import Rows, save_adapters
from bench_methods import decode, lora_of, prefill
from tiny import fill_adapter
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.found_adapters import shared_copy


def median_of(work, rounds: int = 7) -> float:
    work()
    return statistics.median(work() for _ in range(rounds))


def machine() -> dict[str, float]:
    """GB/s of reading, GFLOP/s of a product, with the threads torch uses."""
    large, a, b = torch.ones(2**27), torch.randn(1024, 1024), torch.randn(1024, 1024)

    def read() -> float:
        started = time.perf_counter()
        large.sum()
        return time.perf_counter() - started

    def multiply() -> float:
        started = time.perf_counter()
        a @ b
        return time.perf_counter() - started

    return {"GB/s": 4 * large.numel() / median_of(read) / 1e9, "GFLOP/s": 2 * 1024**3 / median_of(multiply) / 1e9}


def on_the_embedded_base(limits: dict[str, float]) -> dict[str, dict[str, float]]:
    """Decode and prefill: milliseconds, and the share of them that the bound explains."""
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    plain = sum(p.numel() for p in base.parameters())
    models = {
        "base": base,
        "LoRA": lora_of(base, 16).eval(),
        "DoRA": DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=16)).eval(),
        "MixLoRA": MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=16)).eval(),
    }
    found = {}
    for name, model in models.items():
        added = sum(p.numel() for p in model.parameters()) - plain
        if name == "MixLoRA":  # of the experts a step reads two of eight
            experts = sum(p.numel() for key, p in model.adapter_parameters().items() if ".experts." in key)
            added -= experts * 6 // 8
        state: dict = {}
        one, many = median_of(lambda m=model, s=state: decode(m, s)), median_of(lambda m=model: prefill(m, {}), 3)
        body = plain - base.get_input_embeddings().weight.numel()
        arithmetic = 2 * 512 * (body + 49152 * 576 + added * (2 if name == "MixLoRA" else 1))
        found[name] = {
            "decode ms": 1000 * one,
            "reading ms": 1000 * 4 * (plain + added) / (limits["GB/s"] * 1e9),
            "prefill ms": 1000 * many,
            "arithmetic ms": 1000 * arithmetic / (limits["GFLOP/s"] * 1e9),
        }
    return found


def python_and_launches() -> dict[str, float]:
    """CPU microseconds of one thread per adapted linear (210 of them), on 30 layers of next to no width."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=30,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    base = LlamaForCausalLM(config).eval()
    bank = AdapterBank(base)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in save_adapters(base, Path(folder), 16).items():
            bank.load(name, path)
    dora = DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=16)).eval()
    mixlora = MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=16)).eval()
    for model in (dora, mixlora):
        fill_adapter(model, scale=0.01)
    works = {
        "base": Rows(base, [None]),
        "LoRA": Rows(lora_of(base, 16).eval(), [None]),
        "DoRA": Rows(dora, [None]),
        "MixLoRA": Rows(mixlora, [None]),
        "bank, four kinds": Rows(bank.model, [None, "LoRA", "DoRA", "MixLoRA"], bank),
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for index in range(13):
        for name, rows in works.items():
            rows.step(1)
            started = time.thread_time()
            rows.step(8)
            if index:
                taken[name].append((time.thread_time() - started) / 8)
    bare = statistics.median(taken["base"])
    return {name: 1e6 * (statistics.median(times) - bare) / 210 for name, times in taken.items() if name != "base"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    limits = machine()
    results = {"machine": limits, "work": on_the_embedded_base(limits), "python_microseconds": python_and_launches()}
    print("  ".join(f"{value:.1f} {unit}" for unit, value in limits.items()))
    for name, row in results["work"].items():
        print(f"  {name:8} " + "  ".join(f"{key} {value:7.1f}" for key, value in row.items()))
    for name, value in results["python_microseconds"].items():
        print(f"  {name:16} {value:5.1f} microseconds of Python and kernel starts per adapted linear")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
