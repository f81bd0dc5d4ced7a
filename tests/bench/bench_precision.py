"""What the dtype of the base changes in answers: exact match and perplexity of the shipped adapters.

    python tests/bench/bench_precision.py [--items 50] [--json FILE]

Every model answers the same test items in every dtype; the table also has how many of its answers change between right
and wrong against float32. Run it alone, or with OMP_NUM_THREADS=1 beside other work: nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from pathlib import Path
from typing import Any

from minilora_hub.bases import resolve_base
from minilora_hub.bases.loading import DTYPES, load_base
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.evaluation.metrics import perplexity
from minilora_hub.evaluation.run import evaluate


def measure(dtype: str, items: int) -> dict[str, Any]:
    """Answers and perplexity of every model in a dtype, and the bytes of the base."""
    base = load_base(resolve_base("embedded"), dtype=dtype)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*base.parameters(), *base.buffers())}
    report = evaluate(
        shipped_adapters(), base="embedded", dtype=dtype, count=items, few_shot=0, perplexity=True, cache=None
    )
    models = {}
    for model in report.models:
        right = [int(score) for scores in model.scores.values() for score in scores.exact]
        models[Path(model.name).name] = {"right": right, "perplexity": perplexity(model.nll, report.text[1])}
    return {"megabytes": sum(tensors.values()) / 2**20, "models": models}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=50, help="test items of each task")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    measured = {dtype: measure(dtype, arguments.items) for dtype in DTYPES}
    results: dict[str, Any] = {"items": arguments.items, "dtypes": {}}
    exact = measured[DTYPES[0]]["models"]
    for dtype, held in measured.items():
        rows = {}
        for name, model in held["models"].items():
            changed = sum(a != b for a, b in zip(model["right"], exact[name]["right"], strict=True))
            rows[name] = {
                "exact_match": 100 * statistics.fmean(model["right"]),
                "changed": changed,
                "perplexity": model["perplexity"],
            }
            print(f"{dtype:9} {name:24} {rows[name]}", flush=True)
        results["dtypes"][dtype] = {"megabytes": held["megabytes"], "models": rows}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
