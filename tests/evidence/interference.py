"""Measure what tasks that pull apart (`conflicts.py`) cost each other: trained together, against each alone.

    python tests/evidence/interference.py run              # what is missing; goes on after a stop, one result a file
    python tests/evidence/interference.py run --steps 24 --items 25
    python tests/evidence/interference.py report           # the table, also in docs/evidence.md

For each method and seed: one run on all six tasks together, and one on each alone, on about as many of its rows as it
has in the other. Interference is the exact match of a task alone less that of the run on all six: above 0 the tasks
cost each other something. The methods have the sizes and the learning rate of compare_methods.py. If a mixture gives
each task parameters of its own, its interference is smaller than a LoRA's.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evidence.conflicts import CONFLICTS
from evidence.plan import ADAPTERS, METHODS, TITLES
from evidence.routers import SETTINGS, exact, loaded, trained_on
from evidence.store import CODE, RESULTS, command_line, keep
from evidence.tables import percent, table

from minilora_hub.bases.resolving import resolve_base
from minilora_hub.documents import write_whole
from minilora_hub.training.models import load_tokenizer

FOLDER = RESULTS / "interference"
ALL = "together"


@dataclass(frozen=True)
class Sizes:
    """Optimizer steps of the run on all tasks together, rows of a step, and test items of each task."""

    steps: int
    rows: int
    items: int

    def steps_of(self, data: str) -> int:
        """Steps of a run."""
        return self.steps if data == ALL else self.steps // len(CONFLICTS)


def file_of(method: str, data: str, seed: int, sizes: Sizes) -> Path:
    """Where a run's result is."""
    return FOLDER / f"{method}-{data}-seed{seed}-steps{sizes.steps}-rows{sizes.rows}-items{sizes.items}.json"


def write_rows(folder: Path) -> None:
    """Write the training rows of each task, and of all in turn."""
    items = {name: task.items("train") for name, task in CONFLICTS.items()}
    items[ALL] = tuple(item for row in zip(*items.values(), strict=True) for item in row)
    folder.mkdir(parents=True, exist_ok=True)
    for name, some in items.items():
        lines = [json.dumps({"prompt": item.prompt, "completion": item.completion}) for item in some]
        write_whole(folder / f"{name}.jsonl", "\n".join(lines) + "\n")


def measured(method: str, data: str, seed: int, sizes: Sizes, work: Path) -> dict[str, Any]:
    """Train and answer: the test items of all tasks after training on all, else those of the task."""
    started, tokenizer = time.process_time(), load_tokenizer(resolve_base(SETTINGS["base"]))
    out = work / "adapters" / f"{method}-{data}-seed{seed}-steps{sizes.steps}-rows{sizes.rows}"
    settings = {"method": method, "max_steps": sizes.steps_of(data), "batch_size": sizes.rows, "seed": seed}
    trained_on(work / "conflicts" / f"{data}.jsonl", out, **settings, **ADAPTERS[method])
    model = loaded(out)
    tested = {name: CONFLICTS[name].items("test", sizes.items) for name in (CONFLICTS if data == ALL else [data])}
    result: dict[str, Any] = {"method": method, "data": data, "seed": seed, **vars(sizes), "code": CODE}
    result["exact"] = {name: exact(model, tokenizer, some) for name, some in tested.items()}
    return result | {"cpu_seconds": round(time.process_time() - started)}


def plan(methods: Sequence[str], seeds: Sequence[int]) -> list[tuple[str, str, int]]:
    """Return (method, data, seed) in the order of the runs: LoRA and MixLoRA first, a seed at a time."""
    order = sorted(methods, key=("lora", "mixlora", "dora", "mixdora").index)
    return [(method, data, seed) for seed in seeds for method in order for data in (ALL, *CONFLICTS)]


def report() -> str:
    """The table of the runs that are there."""
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    if not held:
        return "None of these runs has been made yet."
    rows = []
    for kind in sorted(set(map(kind_of, held))):
        mine = [one for one in held if kind_of(one) == kind]
        steps, size, _, method, seed = kind
        alone = {one["data"]: percent(one["exact"][one["data"]]) for one in mine if one["data"] != ALL}
        both = {task: percent(one["exact"][task]) for one in mine if one["data"] == ALL for task in CONFLICTS}
        pairs = [[f"{side[task]:.0f}" if task in side else "?" for side in (alone, both)] for task in CONFLICTS]
        lost = [alone[task] - both[task] for task in CONFLICTS if task in alone and task in both]
        cells = [" → ".join(pair) for pair in pairs]
        cells.append(f"{statistics.fmean(lost):+.1f}" if len(lost) == len(CONFLICTS) else "")
        rows.append([f"{TITLES[METHODS[method]]}, seed {seed}, {steps} steps of {size} rows", *cells])
    return "\n".join(table(["exact match in percent, alone → together", *CONFLICTS, "interference"], rows))


def kind_of(result: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """Steps, rows, items, method and seed of a result: those of one line of the table."""
    return result["steps"], result["rows"], result["items"], METHODS.index(result["method"]), result["seed"]


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="only these; again for more")
    parser.add_argument("--seed", action="append", type=int, help="only these; again for more (default: 0, 1, 2)")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps on all tasks together")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--items", type=int, default=200, help="test items of each task")
    arguments = parser.parse_args()
    if arguments.what == "report":
        print(report())
        return
    work, sizes = arguments.work.resolve() / CODE[:12], Sizes(arguments.steps, arguments.rows, arguments.items)
    if not (work / "conflicts").is_dir():
        write_rows(work / "conflicts")
    for method, data, seed in plan(arguments.method or METHODS, arguments.seed or (0, 1, 2)):
        keep(file_of(method, data, seed, sizes), partial(measured, method, data, seed, sizes, work))


if __name__ == "__main__":
    main()
