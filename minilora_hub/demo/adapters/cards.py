"""What a card says about an adapter: its configuration, its file, and what results.json has measured. No Gradio."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from minilora_hub.adapter_folder.folders import adapter_facts
from minilora_hub.adapter_folder.hashes import file_sha256
from minilora_hub.adapter_folder.names import WEIGHTS
from minilora_hub.adapter_folder.results import RESULTS_FILE, Results
from minilora_hub.demo.runs.comparison import Weights
from minilora_hub.errors import AdapterError

CACHED = re.compile(
    r"models--(?P<owner>[\w.-]+)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/|$)", re.ASCII
)
LOSS_POINTS = 120
SCORES = 6


@dataclass(frozen=True)
class Score:
    """One measured number: what was asked, how an answer counts, the adapter's value, the base's, and of how many."""

    task: str
    metric: str
    value: float
    base_value: float | None
    n: int | None


@dataclass(frozen=True)
class AdapterCard:
    """What is shown of one adapter.

    Attributes:
        name: what it is called on the page.
        kind: the method.
        detail: rank, experts.
        parameters: values in its file.
        bytes: of its file.
        weights: the hash of its file, and its commit on the Hub.
        license: None where it is not told.
        repo: its id on the Hub, None where it comes from a folder.
        loss: training losses in order, at most `LOSS_POINTS` of them.
        scores: at most `SCORES` measured numbers.
        trouble: why its results.json is not shown; None where there is nothing wrong with it.
    """

    name: str
    kind: str
    detail: str
    parameters: int
    bytes: int
    weights: Weights
    license: str | None = None
    repo: str | None = None
    loss: tuple[float, ...] = ()
    scores: tuple[Score, ...] = ()
    trouble: str | None = None


def read_card(name: str, folder: Path, *, repo: str | None = None, revision: str | None = None) -> AdapterCard:
    """Read what is known of an adapter from its folder; nothing of it is run, and no tensor is read.

    Args:
        name: what it is called on the page.
        folder: its files.
        repo: its id on the Hub; default: what a folder in the Hub's cache tells.
        revision: its commit there; likewise.

    Raises:
        AdapterError: the folder holds no adapter.
    """
    facts = adapter_facts(folder)
    if repo is None and (cached := CACHED.search(folder.resolve().as_posix())):
        repo, revision = f"{cached['owner']}/{cached['name']}", cached["commit"]
    file = folder / WEIGHTS
    weights = Weights(f"sha256:{file_sha256(file)}", revision)
    known = (name, facts.kind, facts.detail, facts.parameters, file.stat().st_size, weights)
    if not (folder / RESULTS_FILE).is_file():
        return AdapterCard(*known, repo=repo)
    try:
        results = Results.load(folder)
    except AdapterError as error:
        return AdapterCard(*known, repo=repo, trouble=f"{error}")
    losses = [loss for _, loss in results.training.loss] if results.training else []
    scores = [Score(e.task, e.metric, e.value, e.base_value, e.n) for e in results.evaluation[:SCORES]]
    license_name = results.license_name or results.license
    return AdapterCard(*known, license_name, repo, tuple(thinned(losses, LOSS_POINTS)), tuple(scores))


def thinned(values: list[float], amount: int) -> list[float]:
    """Return the means of at most `amount` neighbouring groups of `values`."""
    if len(values) <= amount:
        return values
    edges = [round(index * len(values) / amount) for index in range(amount + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
