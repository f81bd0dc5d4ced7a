"""How the adapter bank grows: thousands of registered adapters, a bounded pool, cold and hot requests.

    python tests/bench/bench_pool.py [--adapters 2000] [--limit-mb 64] [--json FILE]

Registers small random LoRA adapters (r=8 on the attention projections) of the embedded base, then serves rows of them
in random order. Cold is the time to bring an adapter that is not in memory into it; a hot step is one decode step of
four rows of loaded adapters, as a ratio to the same step in a bank where only those four are registered, interleaved.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from bench_bank import Rows
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from minilora_hub.bases import resolve_base
from minilora_hub.compare.adapter_bank import AdapterBank
from minilora_hub.compare.found_adapters import shared_copy


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def save_many(base, folder: Path, count: int) -> list[Path]:
    """Distinct adapters of PEFT's own making; written by PEFT once, then with other values."""
    from safetensors.torch import load_file, save_file

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(shared_copy(base), LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "0")
    settings = (folder / "0" / "adapter_config.json").read_bytes()
    tensors = load_file(folder / "0" / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for index in range(count):
        path = folder / str(index)
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_bytes(settings)
        values = {name: torch.randn(tensor.shape, generator=generator) * 0.01 for name, tensor in tensors.items()}
        save_file(values, path / "adapter_model.safetensors")
    return [folder / str(index) for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=2000)
    parser.add_argument("--limit-mb", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    bank = AdapterBank(base, limit=arguments.limit_mb * 2**20)
    small = AdapterBank(base)
    with tempfile.TemporaryDirectory() as name:
        folders = save_many(base, Path(name), arguments.adapters)
        started = time.perf_counter()
        for folder in folders:
            bank.register(folder.name, folder)
        registering = time.perf_counter() - started

        before, largest, cold = resident_bytes(), 0, []
        choose = random.Random(0)
        for _ in range(arguments.requests):
            wanted = folders[choose.randrange(len(folders))].name
            loaded = next(entry for entry in bank.list() if entry.name == wanted).loaded
            started = time.perf_counter()
            with bank.use([wanted]):
                took = time.perf_counter() - started
            if not loaded:
                cold.append(took)
            largest = max(largest, resident_bytes())

        four = [folder.name for folder in folders[:4]]
        for name in four:
            small.load(name, folders[int(name)])
        hot, few = Rows(bank.model, four, bank), Rows(small.model, four, small)
        bare = Rows(small.model, [None] * 4, small)
        ratios, over_bare = [], []
        with bank.use(four):
            for index in range(arguments.rounds + 1):
                a, b, c = hot.step(), few.step(), bare.step()
                if index:
                    ratios.append(a / b)
                    over_bare.append(a / c)
    quantiles = statistics.quantiles(cold, n=20)
    results = {
        "adapters": arguments.adapters,
        "bytes_of_one": bank.list()[0].bytes or small.list()[0].bytes,
        "limit_bytes": bank.memory().limit,
        "adapter_bytes": bank.memory().adapters,
        "resident_growth_bytes": largest - before,
        "register_milliseconds_each": 1000 * registering / len(folders),
        "cold_milliseconds_median": 1000 * statistics.median(cold),
        "cold_milliseconds_95": 1000 * quantiles[-1],
        "hot_step_ratio": statistics.median(ratios),
        "hot_step_over_bare_rows": statistics.median(over_bare),
    }
    for key, value in results.items():
        print(f"  {key:28} {value:,.2f}" if isinstance(value, float) else f"  {key:28} {value:,}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
