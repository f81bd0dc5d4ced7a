"""The one picture of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora_hub.errors import MissingExtraError


def draw_sweep(path: Path, names: list[str], trials: list[tuple[dict[str, Any], float]]) -> None:
    """Draw validation loss over the first varied setting, a line for each combination of the others.

    Args:
        path: the PNG to write.
        names: the varied settings.
        trials: the varied values and the validation loss of each trial that ended.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "publish") from None
    first, others = names[0], names[1:]
    lines: dict[str, list[tuple[Any, float]]] = {}
    for values, loss in trials:
        label = ", ".join(f"{name} {values[name]}" for name in others)
        lines.setdefault(label, []).append((values[first], loss))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = all(isinstance(values[first], (int, float)) for values, _ in trials)
    for label, points in sorted(lines.items()):
        points.sort(key=lambda point: point[0] if numbers else str(point[0]))
        places = [place if numbers else str(place) for place, _ in points]
        # A search leaves few points a line: dots say more than the lines between them.
        axes.plot(places, [loss for _, loss in points], "o-", markersize=4, label=label or None)
    if numbers and all(values[first] > 0 for values, _ in trials) and len({values[first] for values, _ in trials}) > 2:
        axes.set_xscale("log")
    axes.set_xlabel(first.replace("_", " "))
    axes.set_ylabel("validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if others and len(lines) <= 12:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
