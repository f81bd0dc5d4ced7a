"""Measure how often the nearest prompt belongs to the right task, for `minilora route`: docs/evidence.md.

    python tests/evidence/choosing.py run --items 100      # writes tests/evidence/results/choosing.json
    python tests/evidence/choosing.py report               # the table

The index holds training prompts of the four tasks, evenly spread over the 1,000 rows of each; what is asked are test
items, and items in formats that no training row has. The nearest prompt is compared with the mean of a task's prompts.

How good the answers are that follow from the choice needs no further run: compare_methods.py has trained a LoRA for
each task and measured it on every task, item by item.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from evidence.measure import write_data
from evidence.plan import MIX, TASKS
from evidence.store import RESULTS, Store
from evidence.tables import percent, table
from torch.nn import functional as F

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.prompt_index import AdapterIndex, embedding
from minilora_hub.documents import write_whole
from minilora_hub.evaluation.settings import Settings, find_items, find_tasks, held_out_key
from minilora_hub.training.prompts import read_prompts

FILE = RESULTS / "choosing.json"
COUNTS = (4, 8, 16, 32)


def run(items: int) -> dict[str, Any]:
    """Embed prompts and items, and count the right choices."""
    started, base = time.process_time(), resolve_base("embedded")
    model, tokenizer = load_base(base, dtype="float32").eval(), load_tokenizer(base)
    settings = Settings(tasks=TASKS, count=items, held_out=True)
    asked = {
        key: torch.stack([embedding(model, tokenizer, item.prompt) for item in found])
        for key, found in find_items(find_tasks(settings), settings).items()
    }
    nearest: dict[str, dict[str, str]] = {}
    mean: dict[str, dict[str, str]] = {}
    with TemporaryDirectory() as folder:
        write_data(Path(folder))
        for count in COUNTS:
            prompts = {task: (task, read_prompts([f"{folder}/{task}.train.jsonl"], count)) for task in TASKS}
            index = AdapterIndex.build(model, tokenizer, base.name, "unknown", prompts)
            centres = F.normalize(
                torch.stack([index.vectors[index.owners == number].mean(0) for number in range(len(TASKS))]), dim=1
            )
            near, far = nearest.setdefault(str(count), {}), mean.setdefault(str(count), {})
            for key, vectors in asked.items():
                near[key] = "".join(str(TASKS.index(index.choose(vector).adapter)) for vector in vectors)
                far[key] = "".join(str(number) for number in (vectors @ centres.T).argmax(-1).tolist())
    cpu = round(time.process_time() - started)
    return {"tasks": TASKS, "items": items, "nearest": nearest, "mean": mean, "cpu_seconds": cpu}


def report() -> str:
    """The share of right choices, by the number of prompts of each adapter."""
    held = json.loads(FILE.read_text(encoding="utf-8"))
    keys = [key for task in TASKS for key in (task, held_out_key(task))]
    names = [key.replace("_", "-") for key in keys]
    rows = []
    for way, words in (("nearest", "nearest prompt"), ("mean", "nearest mean")):
        for count, found in held[way].items():
            shares = []
            for key in keys:
                right = str(next(number for number, task in enumerate(TASKS) if key in (task, held_out_key(task))))
                shares.append(f"{100 * found[key].count(right) / len(found[key]):.0f}")
            rows.append([f"{count}, {words}", *shares])
    return "\n".join(table(["prompts of each adapter, choice", *names], rows))


def answers() -> str:
    """Exact match of the chosen adapters, of each task's own, of a single one, and of those trained on all tasks."""
    held = json.loads(FILE.read_text(encoding="utf-8"))
    store, rate, most = Store(), "lr0.0015", max(held["nearest"], key=int)
    single = [store.read(f"single-lora-{task}-{rate}-seed0")["scores"] for task in TASKS]
    chosen = held["nearest"][most]
    scores: dict[str, list[str]] = {f"the LoRA that {most} prompts of each choose": []}
    for task in TASKS:
        picked = (single[int(number)][task]["exact"][item] for item, number in enumerate(chosen[task]))
        scores[next(iter(scores))].append("".join(picked))
    scores["each task's own LoRA"] = [one[task]["exact"] for one, task in zip(single, TASKS, strict=True)]
    for task, one in zip(TASKS, single, strict=True):
        scores[f"the LoRA for {task}, for everything"] = [one[other]["exact"] for other in TASKS]
    for method, title in (("lora", "one LoRA trained on all four"), ("mixlora", "one MixLoRA trained on all four")):
        found = store.read(f"seeds-{method}-{MIX}-{rate}-seed0")["scores"]
        scores[title] = [found[task]["exact"] for task in TASKS]
    rows = []
    for title, exact in scores.items():
        shares = [percent(part[: len(chosen[task])]) for part, task in zip(exact, TASKS, strict=True)]
        rows.append([title, *(f"{share:.0f}" for share in shares), f"{sum(shares) / len(shares):.1f}"])
    return "\n".join(table(["exact match in percent", *TASKS, "mean"], rows))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--items", type=int, default=100, help="items of each task and part")
    arguments = parser.parse_args()
    if arguments.what == "run":
        write_whole(FILE, json.dumps(run(arguments.items), separators=(",", ":")) + "\n")
    print(f"{report()}\n\n{answers()}")


if __name__ == "__main__":
    main()
