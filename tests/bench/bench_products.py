"""All products of the embedded base with a number of rows, in each way that torch offers for float32 on a CPU.

    python tests/bench/bench_products.py [--rounds 9] [--threads 2] [--json FILE]

linear      `F.linear`, the matrix library's x W^T
transposed  the same library's W x^T
oneDNN      the other library that torch brings, by a private operator
packed      the same with copies of the weights in its own layout, which take as much memory as the weights

Beside them two limits: reading every weight once, and the arithmetic at the speed of a product of two large matrices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_bounds import machine
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from minilora_hub.bases import resolve_base

ROWS = (1, 5, 16, 38, 75, 150)
ONE_DNN = torch.ops.mkldnn


def ways(weights: list[Tensor], rows: int) -> dict[str, Callable[[], Tensor]]:
    """Return what multiplies all weights with as many rows, by name; each returns the last product."""
    inputs = {width: torch.randn(rows, width) for width in {weight.shape[1] for weight in weights}}
    packed = [ONE_DNN._reorder_linear_weight(weight, rows) for weight in weights]

    def of_each(multiply: Callable[[Tensor, Tensor], Tensor], used: list[Tensor]) -> Callable[[], Tensor]:
        pairs = [(inputs[weight.shape[1]], one) for weight, one in zip(weights, used, strict=True)]
        return lambda: [multiply(x, weight) for x, weight in pairs][-1]

    def one_dnn(x: Tensor, weight: Tensor) -> Tensor:
        return ONE_DNN._linear_pointwise(x, weight, None, "none", [], "")

    return {
        "linear": of_each(F.linear, weights),
        "transposed": of_each(lambda x, weight: torch.mm(weight, x.t()).t(), weights),
        "oneDNN": of_each(one_dnn, weights),
        "packed": of_each(one_dnn, packed),
    }


def measure(weights: list[Tensor], rows: int, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way, in turns."""
    found = ways(weights, rows)
    right = found["linear"]()
    for work in found.values():
        torch.testing.assert_close(work(), right, rtol=1e-3, atol=1e-3)
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, work in found.items():
            began = time.perf_counter()
            work()
            taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(all_) for name, all_ in taken.items()}


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = AutoModelForCausalLM.from_pretrained(resolve_base("embedded").path, dtype=torch.float32).eval()
    weights = [module.weight.detach() for module in base.modules() if isinstance(module, nn.Linear)]
    values = sum(weight.numel() for weight in weights)
    limits = machine()
    found = {"reading": 4e3 * values / limits["GB/s"] / 1e9, "rows": {}}
    for rows in ROWS:
        arithmetic = 2e3 * values * rows / limits["GFLOP/s"] / 1e9
        found["rows"][rows] = {"arithmetic": arithmetic} | measure(weights, rows, options.rounds)
        print(rows, {name: round(value, 1) for name, value in found["rows"][rows].items()}, flush=True)
    print(json.dumps(limits | {"reading": found["reading"]}))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
