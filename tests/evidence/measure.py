"""One run: trained by `minilora_hub.train`, measured by `minilora_hub.evaluation`, and told as JSON."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evidence.plan import DTYPE, FEW_SHOT, TASKS, TEST_ITEMS, TRAIN_ITEMS, VALIDATION_ITEMS, Run
from evidence.store import CODE
from evidence.tables import bits

from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import TrainingError, TrainingInterrupted
from minilora_hub.evaluation.measured import Model, Report
from minilora_hub.evaluation.report import routers, updated_results
from minilora_hub.evaluation.run import evaluate
from minilora_hub.evaluation.tasks.registry import write
from minilora_hub.publish.push.build import build
from minilora_hub.training.run import train
from minilora_hub.training.run_folder import STATE_FILE


def write_data(folder: Path) -> None:
    """The rows of all runs."""
    write(folder, (), ("train",), TRAIN_ITEMS)
    write(folder, (), ("validation",), VALIDATION_ITEMS)


def with_rows(folder: Path) -> Path:
    """Return a folder, with the rows of all runs in it, which are made if missing."""
    if not (folder / "data").is_dir():
        write_data(folder / "data")
    return folder


def work_folder(work: Path) -> Path:
    """Return where runs of this code keep rows and adapters under `work`, with the rows."""
    return with_rows(work.resolve() / CODE[:12])


def finish(out: Path, **settings: Any) -> Path:
    """Train into `out`, or go on where a killed process was; what is finished is left alone."""
    state = json.loads((out / STATE_FILE).read_text()) if (out / STATE_FILE).is_file() else None
    if not (state and state["finished"]):
        if state is None:
            shutil.rmtree(out, ignore_errors=True)
        train(out, resume=state is not None, **settings)
    return out


def make(run: Run, work: Path) -> dict[str, Any]:
    """Train, go on where a killed process was, and measure.

    Args:
        run: what is trained.
        work: folder for adapters, rows and answers; what is in it is used again.
    """
    out = work / "adapters" / run.adapter
    result: dict[str, Any] = {"run": run.to_dict(), "command": run.command()}
    rows = {"data": "train", "validation_data": "validation"}
    files = {name: str(work / "data" / f"{run.data}.{split}.jsonl") for name, split in rows.items()}
    try:
        finish(out, **files, **run.settings(), **run.about())
    except TrainingInterrupted:
        raise
    except TrainingError as error:  # a learning rate that is too high ends in NaN: that, too, is a result
        if run.part not in ("sweep", "full"):
            raise
        return result | {"validation_loss": None, "failed": str(error)}
    curve = [(int(row["step"]), row) for row in csv.DictReader((out / "loss.csv").open(encoding="utf-8"))]
    told = Results.load(out)
    assert told.training is not None
    result |= {
        "parameters": told.parameters,
        "bytes": (out / "adapter_model.safetensors").stat().st_size,
        "seconds": told.training.seconds,
        "hardware": told.training.hardware,
        "libraries": told.training.libraries,
        "loss": [[step, round(float(row["loss"]), 4)] for step, row in curve if row["loss"]],
        "validation": [[step, float(row["validation_loss"])] for step, row in curve if row["validation_loss"]],
    }
    result["validation_loss"] = min(loss for _, loss in result["validation"])
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    if run.part not in ("sweep", "full"):
        report = measured([out], run.part, work, dtype=run.dtype)
        result |= told_of(report, report.models[-1])
    return result


def base_result(work: Path) -> dict[str, Any]:
    """The base, zero-shot and with examples."""
    report = measured([], "seeds", work, few_shot=FEW_SHOT)
    plain, few = report.models
    return told_of(report, plain) | {"few_shot": told_of(report, few)["scores"]}


def ship(run: Run, work: Path, out: Path) -> None:
    """Turn a measured run into the folder that is published, with the numbers of `minilora eval` in it.

    Args:
        run: a seed.
        work: where its adapter lies.
        out: the folder; one that is there is replaced.
    """
    adapter = work / "adapters" / run.adapter
    report = measured([adapter], run.part, work, few_shot=FEW_SHOT)
    updated_results(report, report.models[-1]).save(adapter)
    build_shipped(adapter, out)


def build_shipped(adapter: Path, out: Path) -> None:
    """Build the folder that is published: today's code, card and reference logits.

    Args:
        adapter: what it is built from; may be `out`.
        out: the folder; one that is there is replaced.
    """
    with TemporaryDirectory(dir=out.parent.parent) as scratch:
        built = build(adapter, Path(scratch) / out.name, repo_id=f"minilora-hub/{out.name}", base_model="embedded")
        for note in built.notes:
            print(note)
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(built.folder, out)


def measured(adapters: list[Path], part: str, work: Path, few_shot: int = 0, dtype: str = DTYPE) -> Report:
    """The test items, the held-out formats where a seed is measured, and general text."""
    return evaluate(
        adapters,
        base="embedded",
        tasks=TASKS,
        count=TEST_ITEMS[part],
        few_shot=few_shot,
        held_out=part == "seeds",
        perplexity=True,
        dtype=dtype,
        cache=work / "answers",
    )


def told_of(report: Report, model: Model) -> dict[str, Any]:
    """Scores item by item, as 0s and 1s; the sums of -ln p; the routers."""
    scores: dict[str, Any] = {}
    for key, said in model.scores.items():
        scores[key] = {"exact": bits(said.exact)}
        if said.f1 is not None:
            scores[key]["f1"] = [round(score, 4) for score in said.f1]
    found: dict[str, Any] = {"scores": scores}
    if model.nll is not None:
        assert report.text is not None
        found["general_text"] = {
            "name": report.text[0].name,
            "sha256": report.text[0].sha256,
            "tokens": list(report.text[1]),
            "nll": [round(value, 3) for value in model.nll],
        }
    if model.routing:
        keys = list(model.routing)
        found["routers"] = {
            key: {"load": use.load, "entropy": use.entropy}
            for key, use in zip(keys, routers(report, model), strict=True)
        }
    return found
