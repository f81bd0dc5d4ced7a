"""Train each method for many steps and measure it on the way: does it stay stable, and what does it forget?

    python tests/evidence/long_runs.py run                            # what is missing; goes on after a stop
    python tests/evidence/long_runs.py run --method lora --seed 1     # one of them, another seed
    python tests/evidence/long_runs.py report                         # the table of docs/evidence.md, and a picture

Every run has the size, the data and the learning rate of compare_methods.py, and is measured before the first step and
at every checkpoint: the loss of test answers, the loss on general text, the norms of A, B and magnitudes, the routers'
entropy. Loss and gradient norm of every step are the training's own log. Base and adapters are in float32, which a CPU
without bfloat16 products multiplies several times faster.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from evidence.long_report import FOLDER, draw, report
from evidence.measure import work_folder
from evidence.pictures import FOLDER as PICTURES
from evidence.plan import ADAPTERS, METHODS, MIX, TASKS
from evidence.routers import SETTINGS, exact, trained_on
from evidence.routing_measures import encoded, general_text, information, read, rounded
from evidence.store import CODE, command_line, keep
from safetensors.torch import load_file

from minilora_hub.bases.resolving import resolve_base
from minilora_hub.evaluation.tasks.registry import TASKS as KNOWN_TASKS
from minilora_hub.training.adapter_checkpoints import CHECKPOINTS, WEIGHTS
from minilora_hub.training.models import build_trainee, load_tokenizer, trainable_parameters
from minilora_hub.training.outputs import LOSS_FILE
from minilora_hub.training.settings import make_settings


@dataclass(frozen=True)
class Length:
    """How long a run is, and what it is measured on.

    Attributes:
        steps: optimizer steps.
        rows: of a step.
        points: measurements after the one before the first step, evenly spread over the steps.
        items: test items of each task.
        windows: of general text.
    """

    steps: int
    rows: int
    points: int
    items: int
    windows: int

    def file(self, method: str, seed: int) -> str:
        """The name of a result."""
        return f"{method}-seed{seed}-steps{self.steps}-rows{self.rows}.json"


def norms(parameters: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return {leaf, e.g. "lora_A": Frobenius norm of the tensors of this name in all layers together}."""
    squares: dict[str, float] = {}
    for name, parameter in parameters.items():
        leaf = name.rpartition(".")[2]
        squares[leaf] = squares.get(leaf, 0.0) + float(parameter.detach().double().square().sum())
    return {leaf: square**0.5 for leaf, square in sorted(squares.items())}


def measured(method: str, work: Path, length: Length, seed: int) -> dict[str, Any]:
    """Train an adapter, or go on with it, and measure it at every point."""
    started = time.process_time()
    own = {"method": method, **ADAPTERS[method], "seed": seed}
    out = trained_on(
        work / "data" / f"{MIX}.train.jsonl",
        work / "adapters" / f"long-{length.file(method, seed).removesuffix('.json')}",
        **own,
        batch_size=length.rows,
        max_steps=length.steps,
        save_every=length.steps // length.points,
        keep_checkpoints=length.points,
    )
    base = resolve_base(SETTINGS["base"])
    tokenizer = load_tokenizer(base)
    known = {"base": SETTINGS["base"], "data": "rows.jsonl", "attention": SETTINGS["attention"]}
    model = build_trainee(make_settings(known, own), base)[0].model.eval()
    items = {task: KNOWN_TASKS[task].items("test", length.items) for task in TASKS}
    every = [item for some in items.values() for item in some]
    examples, tasks = encoded(every, tokenizer), [item.task for item in every]
    text, windows = general_text(tokenizer, length.windows)
    trained = trainable_parameters(model)
    first = {name: parameter.detach().clone() for name, parameter in trained.items()}
    points = []
    for step in range(0, length.steps + 1, length.steps // length.points):
        if step:
            load(trained, out / CHECKPOINTS / f"checkpoint-{step}" / WEIGHTS)
        found = read(model, examples)
        point = {
            "step": step,
            "losses": rounded(found.losses),
            "text_losses": rounded(read(model, windows).losses),
            "norms": norms(trained),
            "moved": norms({name: parameter.detach() - first[name] for name, parameter in trained.items()}),
        }
        if len(found.counts):
            point |= {
                "entropy": rounded(found.entropy),
                "information": rounded(information(found.counts, tasks)),
            }
        points.append(point)
    with (out / LOSS_FILE).open(newline="") as file:
        log = [row for row in csv.DictReader(file) if row["loss"]]
    return {
        "method": method,
        "seed": seed,
        **asdict(length),
        "learning_rate": SETTINGS["learning_rate"],
        "points": points,
        "loss": [float(f"{float(row['loss']):.4g}") for row in log],
        "gradient_norm": [float(f"{float(row['grad_norm']):.4g}") for row in log],
        "exact": {task: exact(model, tokenizer, some) for task, some in items.items()},
        "general_text": {"name": text.name, "sha256": text.sha256},
        "cpu_seconds": round(time.process_time() - started),
        "code": CODE,
    }


@torch.no_grad()
def load(parameters: Mapping[str, torch.Tensor], file: Path) -> None:
    """Put the tensors of a checkpoint into a model: exactly those that it trains."""
    tensors = load_file(file)
    if tensors.keys() != parameters.keys():
        raise ValueError(f"{file.name}: other tensors than the model trains: {tensors.keys() ^ parameters.keys()}")
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="only these; again for more")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=2, help="rows of a step")
    parser.add_argument("--points", type=int, default=10, help="measurements, evenly spread over the steps")
    parser.add_argument("--items", type=int, default=25, help="test items of each task")
    parser.add_argument("--windows", type=int, default=16, help="windows of general text")
    arguments = parser.parse_args()
    if arguments.what == "report":
        print(report())
        draw(PICTURES / "long.png")
        return
    if arguments.steps % arguments.points:
        parser.error(f"--points {arguments.points}: must divide --steps {arguments.steps}")
    work = work_folder(arguments.work)
    length = Length(arguments.steps, arguments.rows, arguments.points, arguments.items, arguments.windows)
    for method in arguments.method or METHODS:
        keep(FOLDER / length.file(method, arguments.seed), partial(measured, method, work, length, arguments.seed))


if __name__ == "__main__":
    main()
