"""The one picture of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.errors import MissingExtraError

if TYPE_CHECKING:
    from minilora_hub.training.sweep import Trial


def draw_sweep(path: Path, names: list[str], trials: list[Trial]) -> None:
    """Draw validation loss over the first varied setting, a line for each combination of the others.

    Args:
        path: the PNG to write.
        names: the varied settings.
        trials: those that ended.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "publish") from None
    first, others = names[0], names[1:]
    lines: dict[str, list[tuple[Any, float]]] = {}
    for trial in trials:
        label = ", ".join(f"{name} {trial.values[name]}" for name in others)
        assert trial.validation_loss is not None
        lines.setdefault(label, []).append((trial.values[first], trial.validation_loss))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    numbers = all(isinstance(trial.values[first], (int, float)) for trial in trials)
    for label, points in sorted(lines.items()):
        points.sort(key=lambda point: point[0] if numbers else str(point[0]))
        places = [place if numbers else str(place) for place, _ in points]
        # A search leaves few points a line: dots say more than the lines between them.
        axes.plot(places, [loss for _, loss in points], "o-", markersize=4, label=label or None)
    if numbers and all(trial.values[first] > 0 for trial in trials) and len({t.values[first] for t in trials}) > 2:
        axes.set_xscale("log")
    axes.set_xlabel(first.replace("_", " "))
    axes.set_ylabel("validation loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    if others and len(lines) <= 12:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
