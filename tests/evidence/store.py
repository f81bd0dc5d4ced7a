"""What the runs came to, as small JSON files: written whole, read back, and told apart from those still to come."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence.plan import FULL_LENGTH, METHODS, Run, final_runs, full_runs, sweep_runs

from minilora_hub.code_inputs import code_hash
from minilora_hub.documents import write_whole

RESULTS = Path(__file__).parent / "results"
BASE = "base"
CODE = code_hash("minilora_hub.training.run", "minilora_hub.evaluation.run")
"""Hash of the code that trains and measures. Adapters, rows and answers of other code are not used again."""


def command_line(doc: str | None, work: str = "evidence-work") -> argparse.ArgumentParser:
    """Return the parser of a script with a `doc`, of which `run` measures and `report` shows."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for rows, adapters and answers")
    return parser


def keep(file: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Make a result and write it, unless it is there."""
    if not file.is_file():
        result = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(result, separators=(",", ":")) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {file.stem}: {result['cpu_seconds']} s", flush=True)


class Store:
    """The files of results in a folder."""

    def __init__(self, folder: Path = RESULTS) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        """Where a run's result is."""
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        """Whether it is there."""
        return self.path(name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """A result."""
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Keep a result, with the code that made it: whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{name}.{os.getpid()}"
        temporary.write_text(json.dumps(value | {"code": CODE}, separators=(",", ":")) + "\n", encoding="utf-8")
        os.replace(temporary, self.path(name))

    def of_other_code(self) -> list[str]:
        """Names of the results that other code has made than this: they may not be comparable with new ones."""
        names = [BASE, *(run.name for run in self.runs())]
        return [name for name in names if self.has(name) and self.read(name).get("code") != CODE]

    def again_in_float32(self) -> Store:
        """The runs on single tasks that were made a second time, in float32: what the dtype changes."""
        return Store(self.folder / "float32")

    def losses(self, runs: list[Run]) -> dict[float, float] | None:
        """Learning rate -> validation loss of these runs, without those that ended in NaN; None if one is missing."""
        if not runs or not all(self.has(run.name) for run in runs):
            return None
        found = {run.learning_rate: self.read(run.name)["validation_loss"] for run in runs}
        return {rate: loss for rate, loss in found.items() if loss is not None}

    def best(self) -> dict[str, tuple[float, ...]]:
        """The learning rates that are tried at full length, of the methods whose short sweep is complete."""
        found = {}
        for method in METHODS:
            losses = self.losses([run for run in sweep_runs() if run.method == method])
            if losses is not None:
                found[method] = tuple(sorted(losses, key=lambda rate: losses[rate])[:FULL_LENGTH])
        return found

    def rates(self) -> dict[str, float]:
        """Each method's learning rate, of the methods whose runs at full length are complete."""
        chosen = {}
        for method in METHODS:
            losses = self.losses([run for run in full_runs(self.best()) if run.method == method])
            if losses is not None:
                chosen[method] = min(losses, key=lambda rate: losses[rate])
        return chosen

    def runs(self) -> list[Run]:
        """Every run that is known so far, in the order in which they are made."""
        return sweep_runs() + full_runs(self.best()) + final_runs(self.rates())

    def done(self, part: str, **wanted: Any) -> list[dict[str, Any]]:
        """Results of a part that are there, of runs with these fields."""
        runs = [run for run in self.runs() if run.part == part and self.has(run.name)]
        return [
            self.read(run.name) for run in runs if all(run.to_dict()[name] == value for name, value in wanted.items())
        ]
