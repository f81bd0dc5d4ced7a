"""Visitors who take turns, a step each, against their rows joined into one batch.

    python tests/bench/bench_turns.py [--visitors 8] [--steps 15]

The embedded base and the shipped adapters, three rows a visitor; CPU time of one decode step, medians of interleaved
steps, as multiples of one visitor's step. Turns cost as many of those as there are visitors.
"""

from __future__ import annotations

import argparse
import statistics
import time

from minilora_hub.compare.engine import CompareEngine, Row, Sampling
from minilora_hub.compare.found_adapters import shipped_adapters


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    engine = CompareEngine("embedded", shipped_adapters(), device="cpu")

    def stream(visitors: int):
        sampling = Sampling(options.steps + 5)
        rows = [
            Row(f"Hi {visitor}", column.adapter, sampling) for visitor in range(visitors) for column in engine.columns
        ]
        steps = engine.stream_steps(rows)
        while not next(steps):  # the prompts are read
            pass
        return steps

    alone, joined = stream(1), stream(options.visitors)
    seconds: dict[str, list[float]] = {"alone": [], "joined": []}
    for _ in range(options.steps):
        for name, steps in (("alone", alone), ("joined", joined)):
            began = time.process_time()
            next(steps)
            seconds[name].append(time.process_time() - began)
    one, all_of_them = (statistics.median(seconds[name]) for name in ("alone", "joined"))
    print(f"one visitor: {1000 * one:.0f} ms of CPU a step")
    print(
        f"{options.visitors} in turns: {options.visitors:.2f} times that; joined in one batch: {all_of_them / one:.2f}"
    )


if __name__ == "__main__":
    main()
