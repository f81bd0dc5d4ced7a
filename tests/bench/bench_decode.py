"""Decoding against transformers' bare base and against the limit of the memory, interleaved in one run.

    python tests/bench/bench_decode.py [--rounds 15] [--dtype float32] [--threads N] [--json FILE]

Every round runs each variant once, in turn, and reads as many bytes as the base's weights have: no step can take less.
The base's products alone, as `few_rows` computes them, show how much of a step is left to everything else.
The table shows medians over the rounds of the ratio to the bare base in the same round, of wall time and of CPU time of
all threads. On a machine that does other work, wall time says little, and CPU time of one thread (`--threads 1`) most.
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
from bench_methods import lora_of
from tiny import fill_adapter

from minilora_hub import DoraConfig, DoraForCausalLM, MixLoraConfig, MixLoraForCausalLM
from minilora_hub.bases import resolve_base
from minilora_hub.bases.loading import DTYPES, load_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.found_adapters import shared_copy
from minilora_hub.remote_code import few_rows

TOKENS = 4  # of a round, as in `Rows.step`
KINDS = [None, "LoRA", "DoRA", "MixLoRA", "MixDoRA"]


class Reading:
    """Read as many bytes as the weights of a model have."""

    def __init__(self, model):
        tensors = [*model.parameters(), *model.buffers()]
        self.weights = torch.ones(sum(tensor.nbytes for tensor in tensors) // 4)

    def step(self) -> float:
        started = time.perf_counter()
        self.weights.sum()
        return time.perf_counter() - started


class Products:
    """Multiply the weight of every linear of a model with some rows, as a step does, and nothing else."""

    def __init__(self, model, rows: int):
        few_rows.remember_weights(model)
        self.weights = [module.weight for module in model.modules() if type(module) is torch.nn.Linear]
        self.rows = {weight.shape[1]: weight.new_ones(rows, weight.shape[1]) for weight in self.weights}

    @torch.inference_mode()
    def step(self) -> float:
        started = time.perf_counter()
        for weight in self.weights * TOKENS:
            few_rows.few_rows_linear(self.rows[weight.shape[1]], weight)
        return (time.perf_counter() - started) / TOKENS


def variants(base, rank: int, folder: Path, plain=None) -> dict[str, Rows | Reading | Products]:
    """Everything that is measured, all over one set of base weights; adapters are made on `plain`, or on `base`."""
    bank = AdapterBank(base)
    plain = plain or base
    for name, path in save_adapters(plain, folder, rank).items():
        bank.load(name, path)
    mixdora = MixLoraForCausalLM.from_base(shared_copy(plain), MixLoraConfig(r=rank, use_dora=True))
    fill_adapter(mixdora, scale=0.01)
    mixdora.save_pretrained(folder / "MixDoRA")
    bank.load("MixDoRA", folder / "MixDoRA")
    models, products = {}, {}
    if plain is base:  # models of their own take a base as it is in its files
        models = {
            "LoRA": lora_of(base, rank),
            "DoRA": DoraForCausalLM.from_base(shared_copy(base), DoraConfig(r=rank)),
            "MixLoRA": MixLoraForCausalLM.from_base(shared_copy(base), MixLoraConfig(r=rank)),
        }
        for name in ("DoRA", "MixLoRA"):
            fill_adapter(models[name], scale=0.01)
        counts = {"products, 1 row": 1, "products, 5 rows": 5, "products, 16 rows": 16}
        products = {name: Products(base, count) for name, count in counts.items()}
    rows = {
        "transformers, base": Rows(shared_copy(base), [None]),
        "engine, base": Rows(bank.model, [None], bank),
        **{f"AutoModel, {name}": Rows(model.eval(), [None]) for name, model in models.items()},
        "transformers, 5 rows": Rows(shared_copy(base), [None] * 5),
        "engine, base and 4 kinds": Rows(bank.model, KINDS, bank),
        "transformers, 16 rows": Rows(shared_copy(base), [None] * 16),
        "engine, 16 rows": Rows(bank.model, [None] * 16, bank),
        "engine, 16 rows of 4 kinds": Rows(bank.model, [kind for kind in KINDS[1:] for _ in range(4)], bank),
    }
    return {"reading": Reading(base), **products, **rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    resolved = resolve_base("embedded")
    base = load_base(resolved, dtype=arguments.dtype).eval()
    plain = load_base(resolved, dtype="bfloat16") if arguments.dtype == "int8" else None
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        measured = variants(base, arguments.rank, Path(folder), plain)
    for index in range(arguments.rounds + 1):
        for name, work in measured.items():
            began = time.process_time()
            seconds = work.step()
            if index:  # the first round warms up
                wall.setdefault(name, []).append(seconds)
                tokens = 1 if name == "reading" else TOKENS
                cpu.setdefault(name, []).append((time.process_time() - began) / tokens)
    results = {}
    print(f"one decode step, {arguments.dtype}, {torch.get_num_threads()} threads, {arguments.rounds} rounds")
    for name in measured:
        bare, limit = wall["transformers, base"], wall["reading"]
        results[name] = {
            "milliseconds": 1000 * statistics.median(wall[name]),
            "ratio": statistics.median(a / b for a, b in zip(wall[name], bare, strict=True)),
            "cpu_ratio": statistics.median(a / b for a, b in zip(cpu[name], cpu["transformers, base"], strict=True)),
            "share_of_limit": statistics.median(a / b for a, b in zip(limit, wall[name], strict=True)),
        }
        print(
            "  {:26} {milliseconds:7.1f} ms  {ratio:5.2f} of the bare base (CPU {cpu_ratio:5.2f}), "
            "{share_of_limit:4.0%} of the memory's speed".format(name, **results[name])
        )
    for (rows, shape, kind, threads), way in few_rows._CHOSEN.items():
        print(f"  {rows:2} rows, {'x'.join(map(str, shape)):10} {kind}, {threads} threads: {way.__name__.strip('_')}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
