"""Write the table and the plot of a sweep."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minilora_hub.documents import write_whole
from minilora_hub.errors import MissingExtraError
from minilora_hub.training.sweep_trials import Trial

TABLE_FILE, PLOT_FILE = "sweep.csv", "sweep.png"


def write_table(out: Path, names: list[str], trials: Sequence[Trial]) -> None:
    """Write ``sweep.csv``: the varied settings and the result of each trial.

    Args:
        out: the sweep's folder.
        names: the varied settings.
        trials: the trials, in the order of the table.
    """
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow([*names, "validation_loss", "step", "seconds", "state", "folder"])
    for trial in trials:
        row = [trial.validation_loss, trial.step, trial.seconds, trial.state, f"trials/{trial.folder}"]
        writer.writerow([*(trial.values[name] for name in names), *row])
    write_whole(out / TABLE_FILE, table.getvalue())


def draw_plot(out: Path, names: list[str], trials: Sequence[Trial]) -> None:
    """Draw ``sweep.png``: validation loss over the first varied setting, a curve for each combination of the others.

    Args:
        out: the sweep's folder.
        names: the varied settings.
        trials: the trials; those without a validation loss are skipped.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "publish") from None
    first, others = names[0], names[1:]
    curves: dict[str, list[tuple[Any, float]]] = {}
    for trial in trials:
        if trial.validation_loss is not None:
            label = ", ".join(f"{name} {trial.values[name]}" for name in others)
            curves.setdefault(label, []).append((trial.values[first], trial.validation_loss))
    places = [place for points in curves.values() for place, _ in points]
    numbers = all(isinstance(place, (int, float)) for place in places)
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, points in sorted(curves.items()):
        points = sorted((place if numbers else str(place), loss) for place, loss in points)
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=label or None)
    if numbers and all(place > 0 for place in places) and len(set(places)) > 2:
        axes.set_xscale("log")
    axes.set_xlabel(first.replace("_", " "))
    axes.set_ylabel("validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if others and len(curves) <= 12:
        axes.legend(frameon=False)
    figure.savefig(out / PLOT_FILE, dpi=150)
