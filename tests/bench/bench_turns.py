"""Comparisons in the scheduler, where visitors share forwards, against turns of a step each, as the page had them.

    python tests/bench/bench_turns.py [--visitors 1 4 16] [--tokens 16] [--rounds 3] [--threads N]

The embedded base and the shipped adapters, a row of each for a visitor, all at once, both ways in alternation; no two
prompts begin alike, so that none is spared the reading of another's. Medians: CPU time for a token; time until the last
visitor has the first token of every row. For the scheduler also what a newcomer does: the time until one who comes
while the others are answered has the first token of every row, and the longest pause of the others' tokens meanwhile;
and the time from a stop of one of them until nothing of theirs is computed.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import statistics
import threading
import time
from typing import Any

import torch

from minilora_hub.bases.loading import load_base, load_tokenizer
from minilora_hub.bases.resolving import resolve_base
from minilora_hub.compare.engine import CompareEngine, Row, Sampling, Update
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.scheduled import page_scheduler
from minilora_hub.serving.rows import ServedRow
from minilora_hub.serving.scheduler import Scheduler


class Bench:
    """Both ways on one engine."""

    def __init__(self, tokens: int) -> None:
        resolved = resolve_base("embedded")
        base, tokenizer = load_base(resolved, dtype=torch.float32), load_tokenizer(resolved)
        self.engine = CompareEngine(base, shipped_adapters(), tokenizer=tokenizer)
        self.scheduler: Scheduler = page_scheduler(self.engine, PageLimits())
        self.scheduler.start()
        self._tokens, self._numbers = tokens, itertools.count()

    def rows(self, times: int = 1) -> list[Row]:
        """Return the rows of a new visitor; at this temperature hardly any answer ends early."""
        number = next(self._numbers)
        prompt = f"{number} is my number. Write this in digits: seven thousand, eight hundred and ten"
        sampling = Sampling(times * self._tokens, temperature=2.0, seed=number)
        # A system message of their own, since chat templates begin all prompts with the same one.
        before = (("system", f"Number {number}."),)
        return [column.row(prompt, sampling, before) for column in self.engine.columns]

    def in_turns(self, visitors: int) -> tuple[int, float]:
        """Return the number of tokens, and the seconds until the last visitor has the first of every row."""
        began, tokens, first = time.perf_counter(), 0, 0.0
        left = [self.engine.stream_steps(self.rows()) for _ in range(visitors)]
        while left:
            for steps in [*left]:
                step = next(steps, None)
                if step is None:
                    left.remove(steps)
                    continue
                tokens += sum(update.token_id is not None for update in step.updates)
                if any(update.tokens == 1 for update in step.updates):
                    first = time.perf_counter() - began
        return tokens, first

    def submit(self, times: int = 1, stop: threading.Event | None = None) -> queue.Queue[Any]:
        """Let the scheduler answer a new visitor; return where (time, update) of each row arrive."""
        arrived: queue.Queue[Any] = queue.Queue()
        stopped = (stop or threading.Event()).is_set

        def deliver(update: Update) -> None:
            arrived.put((time.perf_counter(), update))

        answers, _ = self.engine.answers(self.rows(times))
        self.scheduler.submit(
            [ServedRow(each, each.limit, deliver, bounded=False, stopped=stopped) for each in answers]
        )
        return arrived

    def shared(self, visitors: int) -> tuple[int, float]:
        """Return the same as `in_turns`."""
        began = time.perf_counter()
        seen = [self.read(arrived) for arrived in [self.submit() for _ in range(visitors)]]
        first = max(when for updates in seen for when, update in updates if update.tokens == 1) - began
        return sum(update.token_id is not None for updates in seen for _, update in updates), first

    def read(self, arrived: queue.Queue[Any]) -> list[Any]:
        """Return all updates of a visitor."""
        found: list[Any] = []
        while sum(update.finished for _, update in found) < len(self.engine.columns):
            found.append(arrived.get())
        return found

    def newcomer(self, visitors: int) -> dict[str, float]:
        """Return the seconds of a newcomer's first tokens, of the others' longest pause, and of a stop."""
        stop = threading.Event()
        others = [self.submit(4, stop) for _ in range(visitors)]
        for arrived in others:
            arrived.get()
        time.sleep(1)
        began = time.perf_counter()
        first = max(when for when, update in self.read(self.submit()) if update.tokens == 1)
        asked = time.perf_counter()
        stop.set()
        seen = [self.read(arrived) for arrived in others]
        ended = max(when for updates in seen for when, _ in updates)
        # By rows of one visitor, since they have their tokens together.
        times = ([when for when, _ in updates if began - 1 < when < first + 1] for updates in seen)
        pause = max(max(later - earlier for earlier, later in itertools.pairwise(one)) for one in times)
        return {"first token of a newcomer": first - began, "longest pause": pause, "stop": ended - asked}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, nargs="*", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    bench = Bench(options.tokens)
    bench.in_turns(1), bench.shared(1)  # the first are slower
    for visitors in options.visitors:
        ways = {"turns": bench.in_turns, "scheduler": bench.shared}
        cpu: dict[str, list[float]] = {name: [] for name in ways}
        first: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, way in ways.items():
                busy = time.process_time()
                tokens, seconds = way(visitors)
                cpu[name].append(1000 * (time.process_time() - busy) / tokens)
                first[name].append(seconds)
        for name in ways:
            print(
                f"{visitors:>3} visitors, {name}: {statistics.median(cpu[name]):.1f} CPU ms a token "
                f"({min(cpu[name]):.1f} to {max(cpu[name]):.1f}), first tokens {statistics.median(first[name]):.2f} s",
                flush=True,
            )
        found = bench.newcomer(visitors)
        print(", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.items()), flush=True)
    bench.scheduler.stop()


if __name__ == "__main__":
    main()
