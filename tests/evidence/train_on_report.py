"""The tables of train_on.py, also in docs/evidence.md."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from evidence.plan import DTYPE, TASKS
from evidence.tables import percent, table
from evidence.train_on import FOLDER, Runs, Sizes


def _kind(result: dict[str, Any]) -> tuple[str, int, int, str]:
    """What the results of one table have in common."""
    return result["part"], result["steps"], result["items"], result.get("dtype", DTYPE)


def report() -> str:
    """Tables of the results that are there, one a part and size, and the names of the steps that were not run."""
    lines = []
    held = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]
    for kind in sorted({_kind(one) for one in held if one["part"] != "document"}):  # which is about no task
        part, steps, items, dtype = kind
        lines += [
            "",
            f"{part}: {steps} steps of 8 rows{' for a task' * (part != 'votes')}, {items} test items of each, "
            f"{dtype}; exact match in percent",
            "",
        ]
        rows = []
        for one in held:
            if _kind(one) == kind:
                shares = [percent(one["exact"][task]) for task in TASKS]
                cells = [f"{share:.1f}" for share in (*shares, statistics.fmean(shares))]
                rows.append([one["step"], *cells, str(one.get("perplexity", ""))])
        lines += table(["", *TASKS, "mean", "perplexity"], rows)
    for said in (one["votes"] for one in held if "votes" in one):
        text = (
            f"voted: {said['trained_on']} votes, {said['steps']} steps, {said['cpu_seconds']} seconds of CPU with one "
            f"thread. Of {said['pairs']} held-out pairs the chosen answer is the likelier one in {said['before']} "
            f"before and in {said['after']} after the training."
        )
        lines += ["", textwrap.fill(text, 120)]
    for said in (one["document"] for one in held if "document" in one):
        text = (
            f"document: {said['steps']} steps, {said['cpu_seconds']} seconds of CPU with one thread. The loss on the "
            f"held-out fifth of the text is {said['before']:.3f} before and {said['after']:.3f} after the training."
        )
        lines += ["", textwrap.fill(text, 120)]
    known = {one["step"] for one in held}
    missing = [step.name for step in Runs(Path(), Sizes(0, 0)).steps() if step.name not in known]
    if missing:
        lines += ["", textwrap.fill(f"Not run: {', '.join(missing)}.", 120, break_on_hyphens=False)]
    return "\n".join(lines).strip()
