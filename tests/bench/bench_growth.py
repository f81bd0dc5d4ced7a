"""How the cost of an adapter grows: with its rank, its experts, the context, and the rows of a batch.

    python tests/bench/bench_growth.py [--rounds 5] [--json FILE] [--only rank]

One axis at a time, the others at r=16, 8 experts with 2 active, a context of 256. Every point is interleaved with the
bare base: the tables show medians of the ratio to it in the same round.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench_bank
import bench_methods
from bench_methods import lora_of
from tiny import fill_adapter
from transformers import AutoModelForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.found_adapters import shared_copy

RANKS, EXPERTS, CONTEXTS, ROWS = (4, 16, 64, 128), (2, 8, 32, 64), (256, 1024, 4096), (1, 4, 8, 32)


def mixlora(base, r: int = 16, experts: int = 8):
    model = MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=r, num_experts=experts))
    fill_adapter(model, scale=0.01)
    return model.eval()


def dora(base, r: int = 16):
    model = DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=r))
    fill_adapter(model, scale=0.01)
    return model.eval()


def ratios(works: dict, rounds: int) -> dict[str, float]:
    """Median ratio of each to the work called "base", interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for index in range(rounds + 1):
        for name, work in works.items():
            took = work()
            if index:
                seconds[name].append(took)
    return {
        name: statistics.median(a / b for a, b in zip(taken, seconds["base"], strict=True))
        for name, taken in seconds.items()
    }


def at(model, *, prefill: int | None = None, context: int | None = None):
    """One measurement of a model: reading so many tokens, or decoding one after so many."""
    state: dict = {}
    if prefill is not None:
        return lambda: bench_methods.prefill(model, state, prefill)
    return lambda: bench_methods.decode(model, state, context=context)


def by_rank(base, rounds: int) -> dict[int, dict[str, float]]:
    table = {}
    for r in RANKS:
        models = {"base": base, "LoRA": lora_of(base, r).eval(), "DoRA": dora(base, r), "MixLoRA": mixlora(base, r)}
        table[r] = {f"{name} decode": value for name, value in _both(models, rounds, "decode").items()}
        table[r] |= {f"{name} prefill": value for name, value in _both(models, rounds, "prefill").items()}
    return table


def by_experts(base, rounds: int) -> dict[int, dict[str, float]]:
    table = {}
    for experts in EXPERTS:
        models = {"base": base, "MixLoRA": mixlora(base, experts=experts)}
        table[experts] = {f"{name} decode": value for name, value in _both(models, rounds, "decode").items()}
        table[experts] |= {f"{name} prefill": value for name, value in _both(models, rounds, "prefill").items()}
    return table


def _both(models, rounds: int, what: str) -> dict[str, float]:
    works = {
        name: at(model, **({"prefill": 256} if what == "prefill" else {"context": 64}))
        for name, model in models.items()
    }
    found = ratios(works, rounds)
    return {name: value for name, value in found.items() if name != "base"}


def by_context(base, rounds: int) -> dict[int, dict[str, float]]:
    models = {"base": base, "LoRA": lora_of(base, 16).eval(), "DoRA": dora(base), "MixLoRA": mixlora(base)}
    table = {}
    for context in CONTEXTS:
        found = ratios({name: at(model, context=context) for name, model in models.items()}, rounds)
        table[context] = {f"{name} decode": value for name, value in found.items() if name != "base"}
    return table


def by_rows(base, rounds: int) -> dict[int, dict[str, float]]:
    """A batch of the four kinds in the bank, against as many rows of the bare base outside it."""
    bank = AdapterBank(base)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in bench_bank.save_adapters(base, Path(folder), 16).items():
            bank.load(name, path)
    table = {}
    for count in ROWS:
        kinds = sorted(
            (([None, "LoRA", "DoRA", "MixLoRA"] * count)[:count]), key=lambda name: (name == "MixLoRA", name or "")
        )
        works = {
            "base": bench_bank.Rows(shared_copy(base), [None] * count).step,
            "bank, bare rows": bench_bank.Rows(bank.model, [None] * count, bank).step,
            "bank, four kinds": bench_bank.Rows(bank.model, kinds, bank).step,
        }
        found = ratios(works, rounds)
        table[count] = {name: value for name, value in found.items() if name != "base"}
    return table


AXES = {"rank": by_rank, "experts": by_experts, "context": by_context, "rows": by_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=list(AXES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    results = {}
    for axis, measure in AXES.items():
        if arguments.only not in (None, axis):
            continue
        results[axis] = measure(base, arguments.rounds)
        columns = list(next(iter(results[axis].values())))
        print(f"\n{axis:>8}  " + "  ".join(f"{column:>16}" for column in columns))
        for point, row in results[axis].items():
            print(f"{point:8}  " + "  ".join(f"{row[column]:16.2f}" for column in columns))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
