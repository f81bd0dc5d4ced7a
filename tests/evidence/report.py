"""From the results to docs/evidence.md: the table, what is larger than noise, and the pictures.

When a difference between two methods is called larger than noise: see `significance.py`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from evidence.plan import (
    LEARNING_RATES,
    METHODS,
    MIX,
    SEEDS,
    SINGLE_DTYPES,
    SINGLE_STEPS,
    STEPS,
    SWEEP_STEPS,
    TASKS,
    TEST_ITEMS,
    TITLES,
)
from evidence.significance import CONFIDENCE, POWER, Groups, compare_all, smallest_effect
from evidence.store import BASE, Store

from minilora_hub.evaluation.metrics import perplexity
from minilora_hub.evaluation.settings import held_out_key

ROOT = Path(__file__).parent.parent.parent
HEADERS = {"dates": "dates", "numbers": "numbers", "inflection": "inflection", "records": "records"}


def scores(result: dict[str, Any], key: str, few_shot: bool = False) -> list[float]:
    """Exact match of each item."""
    return [float(score) for score in (result["few_shot"] if few_shot else result["scores"])[key]["exact"]]


def share(result: dict[str, Any], key: str, few_shot: bool = False) -> float:
    """Exact match on one task, in percent."""
    return 100 * statistics.fmean(scores(result, key, few_shot))


def together(result: dict[str, Any], held_out: bool = False, few_shot: bool = False) -> float:
    """The mean of the tasks' exact matches, in percent."""
    return statistics.fmean(share(result, _key(task, held_out), few_shot) for task in TASKS)


def _key(task: str, held_out: bool) -> str:
    return held_out_key(task) if held_out else task


def general(result: dict[str, Any]) -> float:
    """Perplexity on general text."""
    text = result["general_text"]
    return perplexity(text["nll"], text["tokens"])


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; a single value alone."""
    middle = f"{statistics.fmean(values):.{digits}f}"
    return f"{middle} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else middle


def table(store: Store) -> list[str]:
    """The table of the base and of each method, in Markdown."""
    head = ["", *(HEADERS[task] for task in TASKS), "mean", "held-out formats", "perplexity"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    if store.has(BASE):
        base = store.read(BASE)
        for few_shot, name in ((False, "base"), (True, "base, 4 examples")):
            cells = [f"{share(base, task, few_shot):.1f}" for task in TASKS]
            cells += [f"{together(base, False, few_shot):.1f}", f"{together(base, True, few_shot):.1f}"]
            lines.append(_row(name, [*cells, "" if few_shot else f"{general(base):.2f}"]))
    for method in METHODS:
        runs = store.done("seeds", method=method)
        if not runs:
            continue
        cells = [spread([share(run, task) for run in runs]) for task in TASKS]
        cells += [spread([together(run, held_out) for run in runs]) for held_out in (False, True)]
        seeds = f" ({len(runs)} of {len(SEEDS)} seeds)" if len(runs) < len(SEEDS) else ""
        lines.append(_row(TITLES[method] + seeds, [*cells, spread([general(run) for run in runs], 2)]))
    return lines


def items(store: Store) -> str:
    """How many test items there are, as a text."""
    run = store.read(BASE) if store.has(BASE) else store.done("seeds")[0]
    return f"{sum(len(scores(run, task)) for task in TASKS):,}"


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def sweep_table(store: Store) -> list[str]:
    """Validation loss by learning rate: of the short runs, and in brackets of those at full length."""
    lines = ["| learning rate | " + " | ".join(f"{rate:g}" for rate in LEARNING_RATES) + " |"]
    lines += ["| --- |" + " ---: |" * len(LEARNING_RATES)]
    for method in METHODS:
        short, full = (
            {run["run"]["learning_rate"]: run["validation_loss"] for run in store.done(part, method=method)}
            for part in ("sweep", "full")
        )
        cells = []
        for rate in LEARNING_RATES:
            cell = _loss(short[rate]) if rate in short else ""
            cells.append(f"{cell} ({_loss(full[rate])})" if rate in full else cell)
        if short:
            lines.append(_row(TITLES[method], cells))
    return lines


def _loss(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.3f}"


VARIANT_TITLES = {
    "all-active": "MixLoRA, all 4 experts for every token",
    "decided": "MixLoRA, routers that start with preferences",
}


def trials(store: Store) -> list[str]:
    """The variants of the MixLoRA beside it and the LoRA, the first seed of each; nothing where none was tried."""
    tried = store.done("trial")
    if not tried:
        return []
    head = ["first seed", "validation loss", *(HEADERS[task] for task in TASKS), "mean", "perplexity"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    named = [
        (TITLES[method], run) for method in ("lora", "mixlora") for run in store.done("seeds", method=method, seed=0)
    ]
    for name, run in [*named, *((VARIANT_TITLES[run["run"]["variant"]], run) for run in tried)]:
        cells = [_loss(run["validation_loss"]), *(f"{share(run, task):.1f}" for task in TASKS)]
        lines.append(_row(name, [*cells, f"{together(run):.1f}", f"{general(run):.2f}"]))
    return lines


def router_lines(store: Store) -> list[str]:
    """How evenly the routers spread the tokens and how certain they are: a line for each mixture's first seed."""
    lines = []
    for method in METHODS:
        for run in store.done("seeds", method=method, seed=0):
            if not run.get("routers"):
                continue
            used = [run["routers"][task] for task in TASKS]
            shares = [expert for use in used for layer in use["load"] for expert in layer]
            entropy = statistics.fmean(value for use in used for value in use["entropy"])
            even = 100 / len(used[0]["load"][0])
            lines.append(
                f"- {TITLES[method]}: over layers and tasks an expert gets {100 * min(shares):.0f} to "
                f"{100 * max(shares):.0f} % of a layer's slots (even: {even:.0f} %); the routers' entropy is "
                f"{entropy:.2f} of the largest possible"
            )
    return lines


def setting(store: Store) -> list[str]:
    """A line a method: its learning rate, size and time."""
    rates, lines = store.rates(), []
    for method in METHODS:
        runs = store.done("seeds", method=method)
        if runs:
            lines.append(
                f"- {TITLES[method]}: learning rate {rates[method]:g}, {runs[0]['parameters'] / 1e6:.2f} million "
                f"parameters, {runs[0]['bytes'] / 1e6:.1f} MB"
            )
    return lines


def exact_groups(runs: list[dict[str, Any]]) -> Groups:
    """Exact match of a method's runs, by task."""
    return [np.array([scores(run, task) for run in runs]) for task in TASKS]


def text_groups(runs: list[dict[str, Any]]) -> Groups:
    """The mean of -ln p in each window of general text, which are equally long: ln of the perplexity is their mean."""
    texts = [run["general_text"] for run in runs]
    return [np.array([np.divide(text["nll"], text["tokens"]) for text in texts])]


def percent(difference: float) -> float:
    """A difference of ln(perplexity) as a change of the perplexity in percent."""
    return 100 * math.expm1(difference)


OUTCOMES: tuple[tuple[str, Callable[[list[dict[str, Any]]], Groups], Callable[[float], float], str], ...] = (
    ("exact match, points", exact_groups, lambda difference: 100 * difference, "points"),
    ("perplexity on general text, percent", text_groups, percent, "percent"),
)


def differences(store: Store) -> list[str]:
    """A table for each outcome, with a row for each pair of methods that both have runs; and what could be seen."""
    done = {method: store.done("seeds", method=method) for method in METHODS}
    done = {method: runs for method, runs in done.items() if runs}
    lines: list[str] = []
    for title, groups_of, shown, unit in OUTCOMES:
        groups = {method: groups_of(runs) for method, runs in done.items()}
        found = compare_all(groups)
        if not found:
            return []
        lines += [
            f"| {title} | difference | 95% over seeds and items | p over seeds | p, Holm | larger than noise |",
            "| --- |" + " ---: |" * 5,
        ]
        for one in found:
            low, high = (shown(end) for end in one.interval)
            ps = [f"{p:.2g}" if p is not None else "" for p in (one.p, one.p_corrected)]
            cells = [f"{shown(one.difference):+.1f}", f"{low:+.1f} to {high:+.1f}", *ps]
            name = f"{TITLES[one.first]} less {TITLES[one.second]}"
            lines.append(_row(name, [*cells, "yes" if one.larger_than_noise else "no"]))
        alone, strictest = (smallest_effect(list(groups.values()), count) for count in (1, len(found)))
        if alone is not None and strictest is not None:
            lines += [
                "",
                f"A true difference of {shown(alone):.1f} {unit} would be found in {POWER:.0%} of such experiments if "
                f"it were the only comparison, one of {shown(strictest):.1f} {unit} by the strictest step of Holm's "
                f"correction for {len(found)}.",
            ]
        lines.append("")
    return lines[:-1]


def matrix(store: Store, method: str) -> dict[str, dict[str, float]]:
    """Trained on (a task, or the mix) -> tested on -> exact match in percent, on the same items and seed."""
    found: dict[str, dict[str, float]] = {}
    for run in store.done("single", method=method):
        found[run["run"]["data"]] = {task: share(run, task) for task in TASKS}
    for run in store.done("seeds", method=method, seed=0):
        count = TEST_ITEMS["single"]
        found["mix"] = {task: 100 * statistics.fmean(scores(run, task)[:count]) for task in TASKS}
    return found


def alone(store: Store) -> list[str]:
    """Per method, exact match on each task of adapters for that task alone, and of the one for all, in Markdown."""
    lines = ["| " + " | ".join(["", *TASKS, "mean"]) + " |", "| --- |" + " ---: |" * (len(TASKS) + 1)]
    for method in METHODS:
        runs = [run for run in store.runs() if run.part == "single" and run.method == method]
        for dtype, kept in ((SINGLE_DTYPES[method], store), ("float32", store.again_in_float32())):
            if runs and all(kept.has(run.name) for run in runs):
                own = [share(kept.read(run.name), run.data) for run in runs]
                lines.append(_row(f"{TITLES[method]}, each task alone ({dtype})", _cells(own)))
        trained = matrix(store, method)
        if len(trained) > 1 and MIX in trained:
            lines.append(_row(f"{TITLES[method]}, all together", _cells([*trained[MIX].values()])))
    return lines if len(lines) > 2 else []


def _cells(values: list[float]) -> list[str]:
    return [f"{value:.1f}" for value in [*values, statistics.fmean(values)]]


PICTURES: dict[str, tuple[str, Callable[[Store], bool]]] = {
    "loss.png": ("Training loss of each method", lambda store: bool(store.done("seeds"))),
    "matrix.png": (
        "Exact match: trained on one task or the mix, tested on each",
        lambda store: any(len(matrix(store, method)) > 1 for method in METHODS),
    ),
    "expert_load.png": (
        "Which experts serve which task, layer by layer",
        lambda store: any(store.done("seeds", method=method, seed=0) for method in ("mixlora", "mixdora")),
    ),
}


def section(store: Store) -> str:
    """The results as Markdown."""
    runs = [store.done("seeds", method=method) for method in METHODS]
    made, planned = sum(map(len, runs)), len(METHODS) * len(SEEDS)
    lines: list[str] = []
    if made < planned:
        lines += [
            f"These runs are not complete: {made} of {planned} are there. The command above goes on with them.",
            "",
        ]
    if store.done("sweep"):
        lines += [
            f"Validation loss after {SWEEP_STEPS} steps of 8 rows, and in brackets after {STEPS}:",
            "",
            *sweep_table(store),
            "",
        ]
    if made or store.has(BASE):
        lines += [
            f"Exact match in percent on {items(store)} test items (mean ± standard deviation over seeds), "
            f"after {STEPS} steps of 8 rows; perplexity on general text, lower is better.",
            "",
            *table(store),
            "",
            *setting(store),
            "",
            f"Differences of the methods (how they are judged: `tests/evidence/significance.py`; "
            f"{CONFIDENCE:.0%} throughout):",
            "",
            *differences(store),
            "",
            *([*router_lines(store), ""] if router_lines(store) else []),
        ]
    if store.done("trial"):
        lines += ["Attempts to make the MixLoRA better at the same size:", "", *trials(store), ""]
    if alone(store):
        lines += [
            f"Exact match in percent on the same {TEST_ITEMS['single']} items of each task, first seed, trained on "
            f"that task alone ({SINGLE_STEPS} steps, as many of its rows as the mix has) or on all together:",
            "",
            *alone(store),
            "",
        ]
    for name, (text, has) in PICTURES.items():
        if has(store):
            lines += [f"![{text}](../tests/evidence/pictures/{name})", ""]
    return "\n".join(lines).rstrip()
