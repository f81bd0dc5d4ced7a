"""The tables of `routers.py`'s results: what the routers do under each cause, and what moves them."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from evidence.causes import CAUSES, FOLDER
from evidence.plan import STEPS, TASKS, TITLES
from evidence.routing_measures import information
from evidence.store import Store
from evidence.tables import percent, table

from minilora_hub.evaluation.metrics import bootstrapped

TRIALS = {"": "", "decided": ", starting with preferences"}


def report() -> str:
    """The tables of the results that are there: the routers after 240 steps, and under each cause."""
    return "\n\n".join(part for part in (at_full_length(Store()), by_cause()) if part)


def at_full_length(store: Store) -> str:
    """A line for each mixture, from the loads by task that compare_methods.py has stored."""
    rows = []
    for method in ("mixlora", "mixdora"):
        for variant, words in TRIALS.items():
            runs = (
                store.done("trial", method=method, variant=variant) if variant else store.done("seeds", method=method)
            )
            if runs:
                cells = [
                    _mean_of(runs, measure) for measure in (_entropy, _information, _most_information, _favourites)
                ]
                seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
                rows.append([f"{TITLES[method]}{words}, {seeds}", *cells])
    head = [
        f"after {STEPS} steps of 8 rows",
        "entropy, of 1",
        "information on the task, bits of 2",
        "in the layer with most",
        "slots of the layer's two favourite experts, %",
    ]
    return "\n".join(table(head, rows)) if rows else ""


def _loads(run: dict[str, Any]) -> np.ndarray:
    return np.array([run["routers"][task]["load"] for task in TASKS]).transpose(1, 0, 2)  # (mixtures, tasks, experts)


def _entropy(run: dict[str, Any]) -> float:
    return float(np.mean([run["routers"][task]["entropy"] for task in TASKS]))


def _information(run: dict[str, Any]) -> float:
    return float(information(_loads(run), TASKS).mean())


def _most_information(run: dict[str, Any]) -> float:
    return float(information(_loads(run), TASKS).max())


def _favourites(run: dict[str, Any]) -> float:
    return favourites(_loads(run).mean(1))


def favourites(load: Any) -> float:
    """Share of slots that a layer's two most used experts get, in percent, mean of the layers; [layers, experts]."""
    return float(100 * np.sort(load, axis=-1)[:, -2:].sum(-1).mean())


def _mean_of(runs: Sequence[dict[str, Any]], measure: Callable[[dict[str, Any]], float]) -> str:
    values = [measure(run) for run in runs]
    digits = 0 if max(values) > 1 else 3
    low, high = (f"{end:.{digits}f}" for end in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def by_cause() -> str:
    """A line for each result of `routers.py`, and what the longer measurements say."""
    held = [json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")]
    held.sort(key=lambda one: (-one["steps"], one["rows"], list(CAUSES).index(one["cause"]), one["seed"]))
    if not held:
        return ""
    baselines = {_length(one): one for one in held if one["cause"] == "baseline"}
    head = [
        "one run each",
        "steps",
        "entropy, of 1",
        "information on the task, bits (by chance)",
        "slots of the two favourite experts, %",
        "loss",
        "less the baseline's",
        "change with even experts",
        "with the least wanted",
        "exact match, %",
        "perplexity",
    ]
    rows = []
    for one in held:
        baseline = baselines.get(_length(one))
        cells = _routing_cells(one) + _loss_cells(one, baseline)
        cells.append(f"{percent(''.join(one['exact'].values())):.0f}" if "exact" in one else "")
        text = one.get("general_text")
        cells.append(f"{float(np.exp(np.mean(text['losses']))):.2f}" if text else "")
        rows.append([_title(one), _steps(one), *cells])
    missing = [name for name in CAUSES if name not in {one["cause"] for one in held}]
    lines = [
        *table(head, rows),
        "",
        *_moved_lines(held),
        *(_gradient_line(one) for one in held if "gradients" in one),
        *_third_lines(held),
    ]
    if missing:
        lines += ["", textwrap.fill(f"Not run: {', '.join(missing)}.", 120, break_on_hyphens=False)]
    return "\n".join(lines).strip()


def _title(one: dict[str, Any]) -> str:
    return CAUSES[one["cause"]].title + (f", seed {one['seed']}" if one["seed"] else "")


def _length(one: dict[str, Any]) -> tuple[int, int, int, int]:
    return one["steps"], one["rows"], one["items"], one["seed"]


def _steps(one: dict[str, Any]) -> str:
    kind = CAUSES[one["cause"]].kind
    return {"shipped": "240 of 8 rows", "fresh": "0"}.get(kind, f"{one['steps']} of {one['rows']} rows")


def _routing_cells(one: dict[str, Any]) -> list[str]:
    if "entropy" not in one:
        return [""] * 3
    told = f"{statistics.fmean(one['information']):.3f} ({statistics.fmean(one['information_by_chance']):.3f})"
    return [f"{statistics.fmean(one['entropy']):.3f}", told, f"{favourites(one['load']):.0f}"]


def _loss_cells(one: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
    cells = [f"{statistics.fmean(one['losses']):.3f}", ""]
    if baseline is not None and one is not baseline and CAUSES[one["cause"]].kind not in ("shipped", "fresh"):
        cells[1] = _with_interval(one["losses"], baseline["losses"])
    without = one.get("without_choice", {})
    return cells + [
        _with_interval(without[how], one["losses"]) if how in without else "" for how in ("even", "complement")
    ]


def _with_interval(losses: Sequence[float], before: Sequence[float]) -> str:
    """The mean of losses less others of the same rows, with its interval over the rows."""
    differences = np.subtract(losses, before)
    low, high = bootstrapped([differences.tolist()], lambda sample, axis: sample.mean(axis=axis))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def _moved_lines(held: Sequence[dict[str, Any]]) -> list[str]:
    return [
        "- the shipped MixLoRA: training changed a router by "
        f"{statistics.median(one['moved_in_training']):.2f} times its first norm (median of the layers)"
        for one in held
        if "moved_in_training" in one
    ]


def _gradient_line(one: dict[str, Any]) -> str:
    found = one["gradients"]
    ratio = statistics.median(b / g for b, g in zip(found["balance"], found["loss"], strict=True))
    routers, experts = (max(0.0, found[name]) for name in ("agreement", "agreement of B"))
    return (
        f"- {_title(one)}: the balance loss's gradient on a router, with coefficient 1, is {ratio:.2g} "
        f"times the model loss's (median of the layers). The share of the model loss's squared gradient that is the "
        f"same in every batch is {routers:.2f} on the routers and {experts:.2f} on the experts' B"
    )


def _third_lines(held: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for one in held:
        without = one.get("without_choice", {})
        thirds = {
            how.partition(", ")[2]: _with_interval(losses, one["losses"])
            for how, losses in without.items()
            if "," in how
        }
        if thirds:
            parts = ", ".join(f"{third} {cost}" for third, cost in thirds.items())
            lines.append(f"- {CAUSES[one['cause']].title}, the least wanted experts in a third of the layers: {parts}")
    return lines
