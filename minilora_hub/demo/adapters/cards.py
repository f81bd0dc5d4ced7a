"""Cards of adapters, read from the configuration, the weights' header and results.json. No Gradio."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from minilora_hub.adapter_folder.folders import adapter_facts, read_configuration
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import RESULTS_FILE, Results
from minilora_hub.demo.adapters.usage import usage
from minilora_hub.demo.runs.comparison import Weights
from minilora_hub.errors import AdapterError

CACHED = re.compile(
    r"models--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)", re.ASCII
)
LOSS_POINTS = 120
SCORES = 6


@dataclass(frozen=True)
class AdapterCard:
    """The card of one adapter, as adapter_picker.js renders it.

    Attributes:
        name: its name on the page.
        kind: the method.
        facts: rank, number of parameters, size, licence.
        weights: the hash of its weights file, and its commit on the Hub.
        repo: its id on the Hub, None where it comes from a folder.
        loss: training losses in order, at most `LOSS_POINTS`.
        purpose: what it was trained on, in one sentence; None where that is not known.
        score: the measured score over the most items, with its metric, 95% interval and the base's; None without any.
        scores: at most `SCORES` measured numbers: ``{"task", "metric", "value", "base", "n"}``.
        routing: of a mixture, the layer in which the tasks differ most, and the share of each expert there by task:
            ``{"layer", "tasks": [{"task", "load"}]}``; None if it was not measured.
        usage: ways to use it outside the page, ``{"label", "text"}`` each.
        trouble: why its results.json is not shown; None if it is valid.
    """

    name: str
    kind: str
    facts: list[str]
    weights: Weights = field(default_factory=Weights)
    repo: str | None = None
    loss: list[float] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)
    trouble: str | None = None
    purpose: str | None = None
    score: str | None = None
    routing: dict[str, Any] | None = None
    usage: list[dict[str, str]] = field(default_factory=list)


def read_card(name: str, folder: Path, repo: str | None = None, revision: str | None = None) -> AdapterCard:
    """Read an adapter's card from its folder. No code of the folder is run, and no tensor is read.

    Args:
        name: its name on the page.
        folder: its files.
        repo: its id on the Hub. Default: found from the path, if the folder is in the Hub's cache.
        revision: its commit there; likewise.

    Raises:
        AdapterError: the folder holds no adapter.
    """
    facts = adapter_facts(folder)
    if repo is None and (cached := CACHED.search(folder.resolve().as_posix())):
        repo, revision = f"{cached['owner']}/{cached['name']}", cached["commit"]
    file = folder / WEIGHTS
    weights = Weights(f"sha256:{file_sha256(file)}", revision)
    size = file.stat().st_size
    shown = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    results, trouble = None, None
    if (folder / RESULTS_FILE).is_file():
        try:
            results = Results.load(folder)
        except AdapterError as error:
            trouble = f"{error}"
    license_name = results and (results.license_name or results.license)
    losses = [loss for _, loss in results.training.loss] if results and results.training else []
    scores = results.evaluation[:SCORES] if results else ()
    return AdapterCard(
        name,
        facts.kind,
        [facts.detail, f"{facts.parameters:,} parameters", shown, f"licence {license_name or 'unknown'}"],
        weights,
        repo,
        _thinned(losses),
        [{"task": e.task, "metric": e.metric, "value": e.value, "base": e.base_value, "n": e.n} for e in scores],
        trouble,
        _purpose(results) if results else None,
        _score(results) if results else None,
        routing_by_task([(one.task, one.load) for one in results.router]) if results else None,
        usage(read_configuration(folder), name, repo, revision),
    )


def _purpose(results: Results) -> str | None:
    """Return the description of the training data, to its first full stop or bracket, or the names of the data."""
    sources = results.training.data if results.training else ()
    described = next((source.description for source in sources if source.description), None)
    if described:
        return f"Trained on {re.split(r'[.;] |(?<=[)]), ', described)[0].rstrip('.')}."
    names = [source.name for source in sources] or results.datasets
    return f"Trained on {', '.join(names)}." if names else None


def routing_by_task(loads: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> dict[str, Any] | None:
    """Return the layer in which the tasks differ most, and the experts' shares there; None if they cannot differ.

    Args:
        loads: the name of each task, and the share of each expert in each layer.
    """
    names = [name for name, _ in loads]
    # A task in formats that are not in training has the name of the task, and more.
    tasks = {name: load for name, load in loads if not any(name != one and name.startswith(one) for one in names)}
    layers = min(map(len, tasks.values()), default=0)
    if len(tasks) < 2 or not layers:
        return None

    def spread(layer: int) -> float:
        return max(max(shares) - min(shares) for shares in zip(*(load[layer] for load in tasks.values()), strict=True))

    layer = max(range(layers), key=spread)
    return {"layer": layer + 1, "tasks": [{"task": name, "load": list(load[layer])} for name, load in tasks.items()]}


def _score(results: Results) -> str | None:
    shares = [one for one in results.evaluation if one.n and not one.lower_is_better and 0 <= one.value <= 1]
    if not shares:
        return None
    most = max(shares, key=lambda one: one.n or 0)  # the first of several
    base = "" if most.base_value is None else f", base {most.base_value:.0%}"
    interval = f" ({100 * most.interval[0]:.0f} to {100 * most.interval[1]:.0f})" if most.interval else ""
    return f"{most.metric} {most.value:.0%}{interval} of {most.n:,} test items{base}"


def _thinned(values: list[float]) -> list[float]:
    """Reduce a curve to at most `LOSS_POINTS` points, each the mean of a group of neighbours."""
    if len(values) <= LOSS_POINTS:
        return values
    edges = [round(index * len(values) / LOSS_POINTS) for index in range(LOSS_POINTS + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
