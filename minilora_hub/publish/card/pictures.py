"""Draw the pictures of a card from results.json: the loss curve, and the load of the experts, in total and per task.

They are small PNGs in `pictures/`. Equal numbers give byte-identical pictures.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora_hub.adapter_folder.results import Results
from minilora_hub.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = "pictures"
LOSS = f"{FOLDER}/loss.png"
EXPERT_LOAD = f"{FOLDER}/expert_load.png"
EXPERT_LOAD_BY_TASK = f"{FOLDER}/expert_load_by_task.png"
PICTURES = (LOSS, EXPERT_LOAD, EXPERT_LOAD_BY_TASK)
DOTS_PER_INCH = 110
INK, LINE = "#30363d", "#3b6fb6"


def wanted_pictures(results: Results) -> list[str]:
    """Return the paths of the pictures that can be drawn from these results."""
    wanted = []
    if results.training and len(results.training.loss) > 1:
        wanted.append(LOSS)
    if results.expert_load and len(results.expert_load[0]) > 1:
        wanted.append(EXPERT_LOAD)
    if results.router and len(results.router[0].load[0]) > 1:
        wanted.append(EXPERT_LOAD_BY_TASK)
    return wanted


def write_pictures(results: Results, folder: Path) -> list[Path]:
    """Draw the pictures into a folder, and remove pictures that have no data any more.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    wanted = wanted_pictures(results)
    written = []
    for name, draw in zip(PICTURES, (_draw_loss, _draw_expert_load, _draw_load_by_task), strict=True):
        path = folder / name
        if name not in wanted:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(exist_ok=True)
        figure = draw(results)
        # Without the version of the program and the date, which would change the file.
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
    experts = max(map(len, load))
    figure = _figure(min(1.5 + 0.24 * experts, 5.0))
    axes = figure.add_subplot()
    image = _heat_map(axes, load, max(map(max, load)))
    axes.set_xlabel("layer", color=INK)
    _bar(figure, image, axes, experts)
    even = f"{1 / experts:.3g} would be even"
    axes.set_title(f"share of the routed tokens; {even}", fontsize=9, color=INK, loc="left")
    return figure


def _draw_load_by_task(results: Results) -> Figure:
    """Draw a heat map for each task, and below them the entropy of the routers."""
    uses = results.router
    experts = max(len(layer) for use in uses for layer in use.load)
    height = min(0.5 + 0.11 * experts, 2.0)
    figure = _figure(min(height * len(uses) + 1.7 + 0.16 * len(uses), 16.0))
    axes = figure.subplots(len(uses) + 1, 1, height_ratios=[*[height] * len(uses), 1.5], sharex=True)
    most = max(share for use in uses for layer in use.load for share in layer)
    for place, use in zip(axes, uses, strict=False):
        image = _heat_map(place, use.load, most)
        place.set_title(_plain(use.task), fontsize=8, color=INK, loc="left")
    _bar(figure, image, list(axes[: len(uses)]), experts, aspect=30)
    last = axes[-1]
    for use in uses:
        last.plot(range(len(use.entropy)), use.entropy, linewidth=1.4, label=_plain(use.task))
    last.set_ylim(0, 1.02)
    last.set_xlabel("layer", color=INK)
    last.set_title("entropy of the routers (1: no preference)", fontsize=8, color=INK, loc="left")
    last.grid(color="#d8dee4", linewidth=0.6)
    figure.legend(loc="outside lower left", fontsize=7, frameon=False)
    return figure


def _plain(text: str) -> str:
    """Escape a text so that matplotlib does not read it as a formula."""
    return text.replace("$", r"\$")


def _heat_map(axes: Any, load: tuple[tuple[float, ...], ...], most: float) -> Any:
    """Draw the load of experts by layers."""
    from matplotlib.ticker import MaxNLocator

    experts = max(map(len, load))
    rows = [[layer[expert] if expert < len(layer) else float("nan") for layer in load] for expert in range(experts)]
    image = axes.imshow(rows, aspect="auto", cmap="viridis", vmin=0, vmax=most, interpolation="nearest")
    axes.set_ylabel("expert", color=INK)
    axes.set_yticks(range(experts))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(length=0)
    return image


def _bar(figure: Figure, image: Any, axes: Any, experts: int, aspect: float = 20) -> None:
    """Draw the scale of the heat maps, with a line where the load would be even."""
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=aspect)
    bar.set_label("share of tokens", color=INK)
    bar.ax.axhline(1 / experts, color="white", linewidth=1.5)
