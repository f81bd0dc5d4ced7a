"""The pictures of the evidence: what one task costs or gives another, who serves which task, and the loss curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from evidence.plan import METHODS, MIX, TASKS, TITLES
from evidence.report import matrix
from evidence.store import Store
from matplotlib.figure import Figure

FOLDER = Path(__file__).parent / "pictures"
SMOOTH = 10
"""Steps over which a loss curve is averaged."""


def draw_all(store: Store) -> list[Path]:
    """Draw what there are results for."""
    FOLDER.mkdir(exist_ok=True)
    drawn = []
    for name, draw in (("matrix.png", matrices), ("expert_load.png", expert_load), ("loss.png", loss_curves)):
        figure = draw(store)
        if figure is not None:
            # No version of the program and no date in the file: they would differ without a reason.
            figure.savefig(FOLDER / name, dpi=110, metadata={"Software": None}, facecolor="white")
            drawn.append(FOLDER / name)
    return drawn


def matrices(store: Store) -> Figure | None:
    """For each method, trained on (rows) against tested on (columns)."""
    found = {method: matrix(store, method) for method in METHODS}
    found = {method: rows for method, rows in found.items() if len(rows) > 1}
    if not found:
        return None
    figure = Figure(figsize=(3.4 * len(found) + 0.8, 3.6), layout="constrained")
    for place, (method, rows) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), place + 1)
        names = [name for name in (*TASKS, MIX) if name in rows]
        values = np.array([[rows[name][task] for task in TASKS] for name in names])
        axes.imshow(values, vmin=0, vmax=100, cmap="Blues", aspect="auto")
        for line, column in np.ndindex(*values.shape):
            value = values[line, column]
            axes.text(
                column, line, f"{value:.0f}", ha="center", va="center", color="white" if value > 55 else "#30363d"
            )
        axes.set_xticks(range(len(TASKS)), TASKS, rotation=30, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(TITLES[method], fontsize=10)
        axes.set_xlabel("tested on")
        if place == 0:
            axes.set_ylabel("trained on")
    return figure


def expert_load(store: Store) -> Figure | None:
    """For the first seed of each mixture: per task, each expert's share of the tokens in each layer."""
    runs = {
        method: store.done("seeds", method=method, seed=0) for method in METHODS if method in ("mixlora", "mixdora")
    }
    found = {method: some[0] for method, some in runs.items() if some}
    if not found:
        return None
    figure = Figure(figsize=(2.6 * len(TASKS) + 1.2, 2.8 * len(found)), layout="constrained")
    image: Any = None
    grid = figure.subplots(len(found), len(TASKS), squeeze=False, sharex=True, sharey=True)
    for line, (method, run) in enumerate(found.items()):
        for column, task in enumerate(TASKS):
            axes = grid[line][column]
            load = np.array(run["routers"][task]["load"]).T  # (experts, layers)
            image = axes.imshow(100 * load, vmin=0, vmax=50, cmap="viridis", aspect="auto", interpolation="nearest")
            axes.set_title(f"{TITLES[method]}: {task}", fontsize=9)
            axes.set_yticks(range(len(load)))
        grid[line][0].set_ylabel("expert")
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    figure.colorbar(image, ax=grid, label="share of the slots, %")
    return figure


def loss_curves(store: Store) -> Figure | None:
    """Training loss of each method, averaged over seeds and over the last steps."""
    found = {method: store.done("seeds", method=method) for method in METHODS}
    found = {method: runs for method, runs in found.items() if runs}
    if not found:
        return None
    figure = Figure(figsize=(7.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for method, runs in found.items():
        curves = [[loss for _, loss in run["loss"]] for run in runs]
        mean = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        smooth = [statistics.fmean(mean[max(0, at - SMOOTH + 1) : at + 1]) for at in range(len(mean))]
        axes.plot(range(1, len(smooth) + 1), smooth, label=f"{TITLES[method]}, {len(runs)} seeds")
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel(f"training loss, mean of {SMOOTH} steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    return figure
