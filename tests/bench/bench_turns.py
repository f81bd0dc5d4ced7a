"""Visitors who share forwards against visitors who take turns, a step each.

    python tests/bench/bench_turns.py [--visitors 16] [--steps 15] [--threads N]

The embedded base and the shipped adapters, a row of each for a visitor; one decode step of every visitor, medians of
interleaved steps of wall and of CPU time, as multiples of one visitor's step. Turns cost as many of those as there are
visitors.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.found_adapters import shipped_adapters


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=16)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    resolved = resolve_base("embedded")
    base, tokenizer = load_base(resolved, dtype=torch.float32), load_tokenizer(resolved)

    def streams(visitors: int) -> list:
        engine = CompareEngine(base, shipped_adapters(), tokenizer=tokenizer)
        sampling = Sampling(2 * options.steps, temperature=2.0)  # at which hardly any answer ends early
        begun = [
            engine.stream_steps([column.row(f"Hi {visitor}", sampling) for column in engine.columns])
            for visitor in range(visitors)
        ]
        for steps in begun:
            while not next(steps).updates:  # its prompts are read
                pass
        return begun

    groups = {"alone": streams(1), "together": streams(options.visitors)}
    wall: dict[str, list[float]] = {name: [] for name in groups}
    cpu: dict[str, list[float]] = {name: [] for name in groups}
    for _ in range(options.steps):
        for name, begun in groups.items():
            started, busy = time.perf_counter(), time.process_time()
            for steps in begun:
                next(steps, None)
            wall[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - busy)
    for kind, seconds in (("wall", wall), ("CPU", cpu)):
        one, together = (statistics.median(seconds[name]) for name in groups)
        print(
            f"{kind}: a step of one visitor {1000 * one:.0f} ms, of {options.visitors} together {1000 * together:.0f} "
            f"ms; tokens/s of all, taking turns = 1: {options.visitors * one / together:.2f}"
        )


if __name__ == "__main__":
    main()
