"""The scheduler of page and server: what workers of other threads cost it, and when a newcomer has its first token.

    python tests/bench/bench_scheduler.py [--rounds 6] [--others 15] [--base embedded] [--json FILE]

Comparisons over the base and the shipped adapters, without a browser or HTTP; needs a machine that does nothing else.

workers   a step of one comparison's columns, and a product of two rows with a small weight in the same thread, while
          the main thread has OpenMP workers of its own, and after it has let them go, in turns
newcomer  from the request until the first column has a token, and until every column has, beside other comparisons that
          never end: read in a step in which those rows generate as well, and in steps of its own, in turns; and how
          long those rows wait for their next token then
asking    the same beside comparisons that end as they will, each of which begins again at once
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import time
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn import functional as F

from minilora_hub.compare.engine import CompareEngine, Sampling
from minilora_hub.compare.found_adapters import shipped_adapters
from minilora_hub.compare.openmp_workers import release_workers
from minilora_hub.demo.runs.limits import PageLimits
from minilora_hub.demo.runs.runner import Runner
from minilora_hub.demo.runs.scheduled import page_scheduler
from minilora_hub.serving import batching_manager

PROMPT = "{} is the number about which I want a long story with a house by the sea and many words"
QUESTION = "{}: write this number in words, and then the next"
APART = batching_manager.MANY_STREAMS
NEVER = 1 << 30


class Bench:
    """A page's models and scheduler. While it is `endless`, answers end at their length only."""

    def __init__(self, base: str) -> None:
        self.engine = CompareEngine(base, shipped_adapters())
        self.runner = Runner(self.engine, scheduler=page_scheduler(self.engine, PageLimits()))
        self.steps: list[tuple[int, float, float]] = []  # tokens, seconds, seconds of a small product
        self.ends: list[tuple[int, float]] = []  # tokens, and when the step ended
        self.endless = True
        self.numbers = itertools.count(1001, 7)  # no two prompts begin alike: their first tokens would be shared
        answers, forward = self.engine.answers, self.engine.bank.model.forward
        weights = [torch.randn(12, 576) for _ in range(50)]
        rows = torch.randn(2, 576)

        def endless(asked):
            found, failed = answers(asked)
            for answer in found if self.endless else ():
                answer._ends = frozenset()
            return found, failed

        def timed(**inputs):
            product = []
            for weight in weights:
                began = time.perf_counter()
                F.linear(rows, weight)
                product.append(time.perf_counter() - began)
            began = time.perf_counter()
            result = forward(**inputs)
            seconds = time.perf_counter() - began
            self.steps.append((inputs["input_ids"].shape[1], seconds, statistics.median(product)))
            self.ends.append((inputs["input_ids"].shape[1], began + seconds))
            return result

        self.engine.answers, self.engine.bank.model.forward = endless, timed

    async def compare(self, prompt: str, tokens: int) -> tuple[float, float]:
        """Run a comparison with a number of its own in the prompt.

        Returns:
            Seconds until a column has a token, and until every column has.
        """
        prompt = prompt.format(next(self.numbers))
        began, seen = time.perf_counter(), {}
        async for moment in self.runner.answer(prompt, Sampling(tokens), self.engine.columns):
            for update in moment.updates or ():
                if update.token_id is not None:
                    seen.setdefault(update.row, time.perf_counter() - began)
        return min(seen.values()), max(seen.values())

    def workers(self, rounds: int) -> dict:
        """Milliseconds of a step and microseconds of a product, with workers in the main thread and without."""
        found: dict = {name: {"step_ms": [], "product_us": []} for name in ("with", "without")}
        asyncio.run(self.compare(PROMPT, 16))  # warms up
        for _ in range(rounds):
            for name, here in found.items():
                if name == "with":
                    torch.ones(1 << 20).sin_()
                else:
                    release_workers()
                self.steps.clear()
                asyncio.run(self.compare(PROMPT, 16))
                steps = [one for one in self.steps if one[0] == len(self.engine.columns)]
                here["step_ms"].append(1e3 * statistics.median(seconds for _, seconds, _ in steps))
                here["product_us"].append(1e6 * statistics.median(product for *_, product in steps))
        release_workers()
        return medians(found)

    async def newcomers(self, rounds: int, others: int) -> dict:
        """Seconds until a newcomer's first tokens."""
        busy = [asyncio.create_task(self.compare(PROMPT, 512)) for _ in range(others)]
        await asyncio.sleep(15)  # until all of them generate
        ways, rows = {"together": NEVER, "apart": APART}, others * len(self.engine.columns)
        found: dict = {name: {"first_token_s": [], "all_columns_s": [], "longest_wait_s": []} for name in ways}
        for number in range(rounds):
            for name, many in ways.items():
                batching_manager.MANY_STREAMS = many
                del self.ends[:-1]
                first, every = await self.compare(PROMPT, 2)
                found[name]["first_token_s"].append(first)
                found[name]["all_columns_s"].append(every)
                generated = [end for tokens, end in self.ends if tokens >= rows]
                found[name]["longest_wait_s"].append(max(after - end for end, after in pairwise(generated)))
                await asyncio.sleep(0.1 * number)  # so that it comes at another time in a step
        assert not any(one.done() for one in busy), "the others have ended: fewer rounds"
        for one in busy:
            one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*busy)
        return {"others": others, "rows": rows} | medians(found)

    async def asking(self, rounds: int, others: int) -> dict:
        """Seconds until a newcomer's first tokens, beside those who ask as visitors of the page do."""
        self.endless = False

        async def again_and_again() -> None:
            while True:
                await self.compare(QUESTION, 24)

        busy = [asyncio.create_task(again_and_again()) for _ in range(others)]
        await asyncio.sleep(5)
        taken: dict = {"first_token_s": [], "all_columns_s": []}
        for _ in range(rounds):
            for name, seconds in zip(taken, await self.compare(QUESTION, 2), strict=True):
                taken[name].append(seconds)
            await asyncio.sleep(2)
        for one in busy:
            one.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        return {"others": others} | medians({"": taken})[""]


def medians(found: dict) -> dict:
    """Add the median to each list of times."""
    return {
        name: {what: {"median": statistics.median(all_), "all": all_} for what, all_ in here.items()}
        for name, here in found.items()
    }


def main() -> None:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--others", type=int, default=15)
    parser.add_argument("--base", default="embedded")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bench = Bench(options.base)
    found = {"workers": bench.workers(options.rounds)}
    found["newcomer"] = asyncio.run(bench.newcomers(options.rounds, options.others))
    found["asking"] = asyncio.run(bench.asking(3 * options.rounds, options.others))
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
