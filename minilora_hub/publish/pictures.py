"""The two pictures of a card, drawn from results.json: the loss curve, and who served which tokens.

Small PNGs in `pictures/`, because every reader of a card shows those. The same numbers give the same picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from minilora_hub.errors import MissingExtraError
from minilora_hub.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "pictures"
LOSS = f"{FOLDER}/loss.png"
EXPERT_LOAD = f"{FOLDER}/expert_load.png"
DOTS_PER_INCH = 110
INK, LINE = "#30363d", "#3b6fb6"


def wanted_pictures(results: Results) -> list[str]:
    """The pictures that these results have numbers for, as paths in the repo."""
    wanted = []
    if results.training and len(results.training.loss) > 1:
        wanted.append(LOSS)
    if results.expert_load and len(results.expert_load[0]) > 1:
        wanted.append(EXPERT_LOAD)
    return wanted


def write_pictures(results: Results, folder: Path) -> list[Path]:
    """Draw them into a folder, and remove one that there are no numbers for any more.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    wanted = wanted_pictures(results)
    written = []
    for name, draw in ((LOSS, _draw_loss), (EXPERT_LOAD, _draw_expert_load)):
        path = folder / name
        if name not in wanted:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(exist_ok=True)
        figure = draw(results)
        # No version of the program and no date in the file: they would differ without a reason.
        figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None}, facecolor="white")
        written.append(path)
    return written


def _figure(height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("matplotlib", "publish") from None
    return Figure(figsize=(7.2, height), layout="constrained")


def _draw_loss(results: Results) -> Figure:
    training = results.training
    assert training is not None
    steps, losses = zip(*training.loss, strict=True)
    figure = _figure(2.6)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color=LINE, linewidth=1.8, marker="o" if len(steps) <= 60 else None, markersize=3)
    positive = min(losses) > 0
    if positive and max(losses) > 20 * min(losses):
        axes.set_yscale("log")
        axes.set_ylabel("training loss (log scale)", color=INK)
    else:
        axes.set_ylim(bottom=0 if positive else None)
        axes.set_ylabel("training loss", color=INK)
    axes.set_xlabel("step", color=INK)
    axes.set_xlim(0, steps[-1])
    axes.grid(color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_expert_load(results: Results) -> Figure:
    load = results.expert_load
    assert load is not None
    experts = max(len(layer) for layer in load)
    figure = _figure(min(1.5 + 0.24 * experts, 5.0))
    from matplotlib.ticker import MaxNLocator

    axes = figure.add_subplot()
    rows = [[layer[expert] if expert < len(layer) else float("nan") for layer in load] for expert in range(experts)]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=max(map(max, load)), interpolation="nearest")
    axes.set_xlabel("layer", color=INK)
    axes.set_ylabel("expert", color=INK)
    axes.set_yticks(range(experts))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("share of tokens", color=INK)
    even = 1 / experts
    bar.ax.axhline(even, color="white", linewidth=1.5)
    axes.set_title(f"share of the routed tokens; {even:.3g} would be even", fontsize=9, color=INK, loc="left")
    return figure
