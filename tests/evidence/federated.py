"""Measure a federated training against one client alone and against training on all rows: docs/evidence.md.

    python tests/evidence/federated.py run        # writes tests/evidence/results/federated.json; goes on after a stop
    python tests/evidence/federated.py report     # the tables

Four clients have the rows of one task each, so they are as different as they can be. Each trains a LoRA for `--steps`
steps of 4 rows in each of `--rounds` rounds. As many steps as all of them took are then taken one after the other on
the mix of the tasks, and one client trains alone for as many steps as it took. The clients run one after the other in
this process; Flower only carries the messages. Base and adapters are in float32.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from evidence.measure import with_rows
from evidence.plan import MIX, TASKS, TRAINING
from evidence.store import CODE, RESULTS, command_line
from evidence.tables import bits, percent, table

from minilora_hub.documents import write_whole
from minilora_hub.evaluation.run import evaluate
from minilora_hub.training.federated import Answer, FederatedServer, train_client
from minilora_hub.training.run import train

FILE = RESULTS / "federated.json"
DTYPE = "float32"
SETTINGS = TRAINING | {"dtype": DTYPE, "save_dtype": DTYPE, "learning_rate": 1.5e-3, "batch_size": 4}
TITLES = {
    "federated": "four clients with a task each, federated",
    "alone": f"the client with {TASKS[0]}, alone",
    "central": "all rows in one place",
}


def factors_error(answers: Sequence[Answer]) -> float:
    """How far mean(B) mean(A) is from the mean of B A, relative to its norm, over all linears."""
    rows = [answer.rows for answer in answers]
    shares = [count / sum(rows) for count in rows]
    lost = whole = 0.0
    for name in (name for name in answers[0].tensors if "lora_A" in name):
        all_a = [answer.tensors[name] for answer in answers]
        all_b = [answer.tensors[name.replace("lora_A", "lora_B")] for answer in answers]
        exact = sum(share * b @ a for share, a, b in zip(shares, all_a, all_b, strict=True))
        mean_a, mean_b = (sum(s * one for s, one in zip(shares, each, strict=True)) for each in (all_a, all_b))
        lost, whole = lost + float((mean_b @ mean_a - exact).square().sum()), whole + float(exact.square().sum())
    return math.sqrt(lost / whole)


class Runs:
    """The three trainings in a folder with the rows, as `write_data` writes them; each is made once.

    Args:
        work: the folder.
        rounds: of the federated training.
        steps: of a client in a round.
        base: the base.
    """

    def __init__(self, work: Path, rounds: int, steps: int, base: str = "embedded") -> None:
        self.work, self.rounds, self.steps, self.base = work, rounds, steps, base
        self.settings = SETTINGS | {"method": "lora", "r": 12, "base": base}

    def make(self, name: str) -> dict[str, Any]:
        """Train one of `TITLES`; gives the CPU seconds, and of the federated one what the means lost."""
        file = self.work / f"{name}.json"
        if not file.is_file():
            started = time.process_time()
            shutil.rmtree(self.work / name, ignore_errors=True)
            made = self._federated() if name == "federated" else self._central(name)
            write_whole(file, json.dumps(made | {"cpu_seconds": round(time.process_time() - started)}))
        return json.loads(file.read_text(encoding="utf-8"))

    def _federated(self) -> dict[str, Any]:
        residuals, apart = [], []
        with FederatedServer(self.work / "federated", max_steps=self.steps, **self.settings) as server:
            for number in range(1, self.rounds + 1):
                tensors = server.tensors()
                answers = [train_client(tensors, server.sent, self.rows(task), number) for task in TASKS]
                server.add_round(answers, len(answers))
                residuals.append(round(server.rounds[-1].residual, 4))
                apart.append(round(factors_error(answers), 4))
        return {"residual": residuals, "apart": apart}

    def _central(self, name: str) -> dict[str, Any]:
        data, clients = (MIX, len(TASKS)) if name == "central" else (TASKS[0], 1)
        length = self.rounds * self.steps * clients
        said = self.settings | {"max_steps": length, "save_every": length, "record": False, "progress": False}
        train(self.work / name, data=self.rows(data), **said)
        return {}

    def rows(self, data: str, split: str = "train") -> str:
        """A file of rows."""
        return str(self.work / "data" / f"{data}.{split}.jsonl")

    def validation_loss(self, name: str) -> float:
        """The loss on the validation rows of all tasks, at a step that changes nothing."""
        still = SETTINGS | {"learning_rate": 1e-30, "max_steps": 1, "record": False, "progress": False}
        files = {"data": self.rows(MIX), "validation_data": self.rows(MIX, "validation"), "base": self.base}
        with TemporaryDirectory() as scratch:
            result = train(Path(scratch, "out"), from_adapter=str(self.work / name), **files, **still)
        assert result.validation_loss is not None
        return round(result.validation_loss, 4)

    def measure(self, items: int) -> dict[str, Any]:
        """Make what is not there, and measure it."""
        made = {name: self.make(name) for name in TITLES}
        found: dict[str, Any] = {}
        started = time.process_time()
        for name in TITLES:
            folder, cache = [self.work / name], self.work / "answers"
            settings: dict[str, Any] = {"tasks": TASKS, "count": items, "few_shot": 0, "dtype": DTYPE}
            scores = evaluate(folder, base=self.base, cache=cache, **settings).models[-1].scores
            exact = {task: bits(scores[task].exact) for task in TASKS}
            found[name] = {"exact": exact, "validation_loss": self.validation_loss(name)}
        cpu = {name: one["cpu_seconds"] for name, one in made.items()}
        cpu["measuring"] = round(time.process_time() - started)
        sizes = {"rounds": self.rounds, "steps": self.steps, "items": items}
        lost = {name: made["federated"][name] for name in ("residual", "apart")}
        return sizes | lost | {"models": found, "cpu_seconds": cpu, "code": CODE}


def report() -> str:
    """Exact match and validation loss, and what the mean loses in each round."""
    if not FILE.is_file():
        return "This has not been run yet."
    held = json.loads(FILE.read_text(encoding="utf-8"))
    total = held["rounds"] * held["steps"] * len(TASKS)
    rows = []
    for name, title in TITLES.items():
        found = held["models"][name]
        shares = [percent(found["exact"][task]) for task in TASKS]
        cells = [f"{share:.0f}" for share in [*shares, statistics.fmean(shares)]]
        rows.append([title, *cells, f"{found['validation_loss']:.3f}"])
    errors = {"mean of B A, by SVD back to the rank": "residual", "mean of B times mean of A": "apart"}
    lines = [
        f"{held['rounds']} rounds of {held['steps']} steps of 4 rows for each client, {total} steps in all; "
        f"{held['items']} test items of each task, exact match in percent:",
        "",
        *table(["", *TASKS, "mean", "validation loss"], rows),
        "",
        *table(
            ["relative error of a round's mean", *map(str, range(1, held["rounds"] + 1))],
            [[title, *(f"{one:.3f}" for one in held[key])] for title, key in errors.items()],
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--only", choices=TITLES, help="make one adapter, and measure nothing")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a client in a round")
    parser.add_argument("--items", type=int, default=25, help="test items of each task")
    arguments = parser.parse_args()
    if arguments.what == "run":
        work = arguments.work.resolve() / f"federated-{CODE[:12]}-{arguments.rounds}x{arguments.steps}"
        runs = Runs(with_rows(work), arguments.rounds, arguments.steps)
        if arguments.only:
            print(runs.make(arguments.only))
            return
        write_whole(FILE, json.dumps(runs.measure(arguments.items), indent=1) + "\n")
    print(report())


if __name__ == "__main__":
    main()
