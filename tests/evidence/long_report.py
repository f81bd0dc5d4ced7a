"""What `long_runs.py` found: a table at a few steps, and a picture of every curve."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from evidence.plan import METHODS, TITLES
from evidence.store import RESULTS
from evidence.tables import percent, table
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

FOLDER = RESULTS / "long"
SMOOTH = 50
"""Steps over which the training's own log is averaged."""
SHOWN = (0.0, 0.1, 0.3, 0.5, 1.0)
"""Shares of the run at which the table has a line."""


def results() -> list[dict[str, Any]]:
    """The results that are there, by length, method and seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    return sorted(found, key=lambda one: (one["steps"], one["rows"], METHODS.index(one["method"]), one["seed"]))


def report() -> str:
    """A line for each run and some of its steps, and what each run answers at its end."""
    found = results()
    if not found:
        return ""
    head = [
        "",
        "step",
        f"training loss, mean of {SMOOTH} steps",
        f"gradient norm, median of {SMOOTH} steps",
        "loss of test answers",
        "perplexity of general text",
        "norm of A, start = 1",
        "norm of B",
        "magnitudes moved, %",
        "norm of the routers, start = 1",
        "routers' entropy, of 1",
    ]
    rows = []
    for one in found:
        shown = [point for point in one["points"] if point["step"] in {round(share * one["steps"]) for share in SHOWN}]
        rows += [[_title(one), str(point["step"]), *_cells(one, point)] for point in shown]
    missing = [TITLES[method] for method in METHODS if method not in {one["method"] for one in found}]
    notes = ["", f"Not run: {', '.join(missing)}."] if missing else []
    return "\n".join([*table(head, rows), "", *map(_end, found), *notes])


def _title(one: dict[str, Any]) -> str:
    return TITLES[one["method"]] + (f", seed {one['seed']}" if one["seed"] else "")


def _cells(one: dict[str, Any], point: dict[str, Any]) -> list[str]:
    last = slice(max(0, point["step"] - SMOOTH), point["step"])
    losses, gradients = one["loss"][last], one["gradient_norm"][last]
    values = [measure(one, point) for measure in MEASURES.values()]
    return [
        f"{statistics.fmean(losses):.3f}" if losses else "",
        f"{statistics.median(gradients):.2f}" if gradients else "",
        *("" if value is None else f"{value:.{digits}f}" for value, digits in zip(values, DIGITS, strict=True)),
    ]


def _relative(one: dict[str, Any], point: dict[str, Any], leaf: str) -> float | None:
    first = one["points"][0]["norms"].get(leaf)
    return point["norms"][leaf] / first if first else None


def _moved(one: dict[str, Any], point: dict[str, Any]) -> float | None:
    moved = point["moved"].get("magnitude")
    return None if moved is None else 100 * moved / one["points"][0]["norms"]["magnitude"]


MEASURES: dict[str, Callable[[dict[str, Any], dict[str, Any]], float | None]] = {
    "loss of test answers": lambda one, point: statistics.fmean(point["losses"]),
    "perplexity of general text": lambda one, point: float(np.exp(statistics.fmean(point["text_losses"]))),
    "norm of A, start = 1": lambda one, point: _relative(one, point, "lora_A"),
    "norm of B": lambda one, point: point["norms"]["lora_B"],
    "magnitudes moved, %": _moved,
    "norm of the routers, start = 1": lambda one, point: _relative(one, point, "router"),
    "routers' entropy, of 1": lambda one, point: statistics.fmean(point["entropy"]) if "entropy" in point else None,
}
DIGITS = (3, 2, 2, 1, 2, 2, 3)


def _end(one: dict[str, Any]) -> str:
    right = "".join(one["exact"].values())
    peak = max(one["gradient_norm"])
    by_task = ", ".join(f"{task} {percent(exact):.0f}" for task, exact in one["exact"].items())
    return (
        f"- {_title(one)}: {one['steps']:,} steps of {one['rows']} rows; right in "
        f"{percent(right):.0f}% of {len(right)} answers ({by_task}); the largest gradient norm "
        f"is {peak:.1f}, in step {one['gradient_norm'].index(peak) + 1}"
    )


def draw(file: Path) -> None:
    """Draw every curve of the longest runs: the log smoothed, the measures at their points."""
    found = results()
    longest = max((one["steps"], one["rows"]) for one in found)
    runs = [one for one in found if (one["steps"], one["rows"]) == longest]
    logs = {"training loss": "loss", "gradient norm": "gradient_norm"}
    figure = Figure(figsize=(11, 7.2), layout="constrained")
    grid = figure.subplots(3, 3).flatten()
    for axes, (title, name) in zip(grid, logs.items(), strict=False):
        for one in runs:
            smooth = _smooth(one[name])
            axes.plot(range(1, len(smooth) + 1), smooth, color=_color(one), label=_title(one), linewidth=1.2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_title(f"{title}, mean of {SMOOTH} steps", fontsize=9)
    for axes, (title, measure) in zip(grid[len(logs) :], MEASURES.items(), strict=True):
        for one in runs:
            values = [(point["step"], measure(one, point)) for point in one["points"]]
            if values[-1][1] is not None:
                axes.plot(*zip(*values, strict=True), color=_color(one), marker=".", linewidth=1.2)
        axes.set_title(title, fontsize=9)
    for axes in grid:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_xlabel("step", fontsize=8)
    grid[0].legend(frameon=False, fontsize=8)
    # No version of the program and no date in the file: they would differ without a reason.
    figure.savefig(file, dpi=110, metadata={"Software": None}, facecolor="white")


def _color(one: dict[str, Any]) -> str:
    return f"C{METHODS.index(one['method'])}"


def _smooth(values: Sequence[float]) -> list[float]:
    return [statistics.fmean(values[max(0, at - SMOOTH + 1) : at + 1]) for at in range(len(values))]
