"""What rows of different adapters cost together: one decode step of the bank, as ratios to rows of the bare base.

    python tests/bench/bench_bank.py [--rounds 9] [--json FILE]

Every round runs each variant once, in turn; the table shows medians over the rounds of the ratio to four bare base rows
in the same round, and quartiles.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from peft import LoraConfig, get_peft_model
from tiny import fill_adapter
from transformers import AutoModelForCausalLM

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.decoding import CachedForward
from minilora_hub.compare.found_adapters import shared_copy

CONTEXT = 64


def save_adapters(base, folder: Path, r: int) -> dict[str, Path]:
    """One random adapter of each kind, on all seven projections, as folders."""
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    lora = get_peft_model(shared_copy(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in lora.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.01)
    models = {"LoRA": lora}
    models["DoRA"] = DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=r))
    models["MixLoRA"] = MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=r))
    for name in ("DoRA", "MixLoRA"):
        fill_adapter(models[name], scale=0.01)
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


class Rows:
    """A batch that decodes one token at a time, from its own cache, on a model that may be a bank's."""

    def __init__(self, model, names, bank=None):
        self.forward, self.names, self.bank = CachedForward(model), names, bank

    @torch.inference_mode()
    def step(self, tokens: int = 4) -> float:
        if self.forward.cache is None:
            self._forward(torch.arange(CONTEXT).repeat(len(self.names), 1) + 100)
        token = torch.full((len(self.names), 1), 42)
        started = time.perf_counter()
        for _ in range(tokens):
            self._forward(token)
        took = (time.perf_counter() - started) / tokens
        self.forward.cache.crop(-tokens)
        return took

    def _forward(self, ids):
        with nullcontext() if self.bank is None else self.bank.rows(self.names):
            self.forward(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    bank = AdapterBank(base)
    with tempfile.TemporaryDirectory() as folder:
        for name, path in save_adapters(base, Path(folder), arguments.rank).items():
            bank.load(name, path)
    mixed = [None, "LoRA", "DoRA", "MixLoRA"]
    variants = {
        "4 bare rows": Rows(shared_copy(base), [None] * 4),
        "1 bare row": Rows(shared_copy(base), [None]),
        "bank: 4 bare": Rows(bank.model, [None] * 4, bank),
        "bank: 4 kinds": Rows(bank.model, mixed, bank),
        **{f"bank: 4 {name}": Rows(bank.model, [name] * 4, bank) for name in mixed[1:]},
        **{f"bank: 1 {name}": Rows(bank.model, [name], bank) for name in mixed[1:]},
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for index in range(arguments.rounds + 1):
        for name, rows in variants.items():
            took = rows.step()
            if index:  # the first round warms up
                seconds[name].append(took)
    results = {}
    print(f"one decode step ({arguments.rounds} rounds), against four bare base rows in one batch")
    for name, taken in seconds.items():
        ratios = [a / b for a, b in zip(taken, seconds["4 bare rows"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        results[name] = {"milliseconds": 1000 * statistics.median(taken), "ratio": middle, "low": low, "high": high}
        print(f"  {name:16} {1000 * statistics.median(taken):7.1f} ms  {middle:5.2f}  [{low:.2f}, {high:.2f}]")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
