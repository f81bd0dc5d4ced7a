"""Measure what a start that makes up for the rounding of a base gains: docs/evidence.md.

    python tests/evidence/low_bit.py run       # every step; goes on after a stop
    python tests/evidence/low_bit.py report    # the tables

The embedded base is quantized in four ways, and a LoRA starts on each at zero, by LoftQ and calibrated on training rows
of the task `dates`. Perplexity on general text is measured at the start, for one kind also after a short training on
`dates`, with exact match on its test items. Every step's result is a small file in tests/evidence/results/low_bit.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from evidence.measure import with_rows
from evidence.plan import TRAINING
from evidence.routing_measures import general_text
from evidence.store import RESULTS, command_line, keep
from evidence.tables import bits, percent, table
from torch.nn import functional as F

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.quantizing import quantize_base
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.evaluation.run import evaluate
from minilora_hub.training.compensation import compensate
from minilora_hub.training.dataset import prepare_data
from minilora_hub.training.models import build_trainee
from minilora_hub.training.run import train
from minilora_hub.training.settings import make_settings

FOLDER = RESULTS / "low_bit"
TASK = "dates"
STARTS = ("zero", "loftq", "calibrated")
WINDOWS, STEPS, ITEMS = 8, 16, 40


@dataclass(frozen=True)
class Case:
    """A quantized base and the rank on it; `trained` if a training follows the start."""

    kind: str
    group_size: int | None
    rank: int
    trained: bool = False

    @property
    def title(self) -> str:
        """Its name in the table."""
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{self.kind}{groups}, r = {self.rank}"

    def file(self, start: str) -> Path:
        """The file of a step's result."""
        return FOLDER / f"{self.kind}-r{self.rank}-{start}{'-trained' * self.trained}.json"


CASES = (
    Case("int3", 64, 16),
    Case("nf4", None, 16),
    Case("int3", 64, 16, trained=True),
    Case("int2", 16, 64),
    Case("int4", 64, 16),
)


class Runs:
    """The steps.

    Args:
        work: folder of rows, quantized bases and adapters.
        base: the exact base.
    """

    def __init__(self, work: Path, base: str = "embedded") -> None:
        self.work, self.base = work, base
        _, windows = general_text(load_tokenizer(resolve_base(base)), WINDOWS)
        self.windows = torch.tensor([window.input_ids for window in windows])

    @torch.no_grad()
    def perplexity(self, model: Any) -> float:
        """Of every token of the windows but the first."""
        total = 0.0
        for row in self.windows.split(1):
            logits = model(row, use_cache=False).logits[0, :-1]
            total += F.cross_entropy(logits.float(), row[0, 1:], reduction="sum").item()
        return round(math.exp(total / self.windows[:, 1:].numel()), 2)

    def exact(self) -> dict[str, Any]:
        """Measure the exact base."""
        began = time.process_time()
        perplexity = self.perplexity(load_base(resolve_base(self.base), dtype="float32").eval())
        return {"perplexity": perplexity, "cpu_seconds": round(time.process_time() - began)}

    def measure(self, case: Case, start: str) -> dict[str, Any]:
        """Make a start, train from it where the case says so, and measure it."""
        began = time.process_time()
        quantized = self.work / f"{case.kind}-{case.group_size}"
        if not quantized.exists():
            quantize_base(self.base, case.kind, quantized, group_size=case.group_size, dtype="float32")
        said = {"method": "lora", "base": str(quantized), "r": case.rank, "init": start, "dtype": "float32"}
        data = str(self.work / "data" / f"{TASK}.train.jsonl")
        result: dict[str, Any] = {"kind": case.kind, "rank": case.rank, "start": start}
        if case.trained:
            out = self.work / case.file(start).stem
            shutil.rmtree(out, ignore_errors=True)
            chosen = TRAINING | said | {"learning_rate": 1.5e-3, "max_steps": STEPS, "record": False}
            result["seconds"] = train(out, data=data, progress=False, **chosen).seconds
            report = evaluate(
                [out], base=str(quantized), tasks=(TASK,), count=ITEMS, few_shot=0, perplexity=False, dtype="float32"
            )
            result["exact"] = bits(report.models[-1].scores[TASK].exact)
            from peft import PeftModel

            plain = load_base(resolve_base(quantized), dtype="float32")
            result["perplexity"] = self.perplexity(PeftModel.from_pretrained(plain, out).eval())
        else:
            resolved = resolve_base(quantized)
            settings = make_settings(said | {"data": data})
            trainee, _ = build_trainee(settings, resolved)
            if start != "zero":
                with TemporaryDirectory() as folder:
                    rows = prepare_data(
                        settings, load_tokenizer(resolved), 8192, Path(folder), ends=[2], now=datetime.now(UTC)
                    ).train
                    found = compensate(trainee.model, settings, resolved, rows)
                result["error"] = [round(found.before, 4), round(found.after, 4)]
            result["perplexity"] = self.perplexity(trainee.model.eval())
        return result | {"cpu_seconds": round(time.process_time() - began)}


def _read(file: Path) -> dict[str, Any] | None:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def report() -> str:
    """The tables of the results that are there, and the names of the steps that were not run."""
    exact, missing = _read(FOLDER / "exact.json"), []
    found = {(case, start): _read(case.file(start)) for case in CASES for start in STARTS}
    missing = [case.file(start).stem for (case, start), result in found.items() if result is None]
    heads = ["", "from zero", "LoftQ", "calibrated"]
    lines = [f"Perplexity on general text before any training; the exact base has {exact and exact['perplexity']}:", ""]
    rows = []
    for case in CASES:
        cells = [str(result["perplexity"]) if (result := found[case, start]) else "" for start in STARTS]
        if not case.trained and any(cells):
            rows.append([case.title, *cells])
    lines += table(heads, rows)
    trained = [case for case in CASES if case.trained and any(found[case, start] for start in STARTS)]
    for case in trained:
        lines += ["", f"After {STEPS} steps of 8 rows of `{TASK}`, {case.title}:", ""]
        rows = []
        for name, key in ((f"exact match of {ITEMS} items in percent", "exact"), ("perplexity", "perplexity")):
            values = [result[key] if (result := found[case, start]) else "" for start in STARTS]
            rows.append([name, *(f"{percent(v):.0f}" if key == "exact" and v else str(v) for v in values)])
        lines += table(heads, rows)
    return "\n".join([*lines, *(["", f"Not run: {', '.join(missing)}."] if missing else [])])


def main() -> None:
    """Parse the command line."""
    parser = command_line(__doc__, "evidence-work/low_bit")
    arguments = parser.parse_args()
    if arguments.what == "run":
        runs = Runs(with_rows(arguments.work.resolve()))
        keep(FOLDER / "exact.json", runs.exact)
        for case in CASES:
            for start in STARTS:
                keep(case.file(start), partial(runs.measure, case, start))
    print(report())


if __name__ == "__main__":
    main()
