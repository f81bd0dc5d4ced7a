"""The blocks of figures in the docs, each rendered from the files that benchmarks and runs have written."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evidence import (
    choosing,
    federated,
    interference,
    long_report,
    low_bit,
    low_bit_fits,
    report,
    routing_report,
    tables,
    train_on_report,
)
from evidence.store import Store

BENCH = Path(__file__).resolve().parents[1] / "bench"
METHODS = ("LoRA", "DoRA", "MixLoRA", "PEFT LoRA", "PEFT DoRA", "mixlora")
WORKS = {
    "prefill": "prefill of 512 tokens, the bare base = 1",
    "decode": "decoding one token, the bare base = 1",
    "training": "forward and backward of 2 x 128 tokens, PEFT LoRA = 1",
    "training with dropout": "the same with dropout 0.05, PEFT LoRA = 1",
}


def results(name: str) -> dict[str, Any]:
    """Return what a benchmark has written."""
    found: dict[str, Any] = json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(tables.table(head, rows))


def ratios(works: Sequence[str]) -> list[list[str]]:
    """Return a row for each kind of work, a cell for each method."""
    measured = results("costs")["methods"]
    rows = []
    for work in works:
        unit = "PEFT LoRA" if work.startswith("training") else None
        cells = [
            "1" if name == unit else f"{measured[work][name]['ratio']:.2f}" if name in measured[work] else ""
            for name in METHODS
        ]
        rows.append([WORKS[work], *cells])
    return rows


def summary() -> str:
    """Prefill and decoding, for the README."""
    return table(["", *METHODS], ratios(["prefill", "decode"]))


def costs() -> str:
    """What each method costs in time and memory, and how that grows."""
    held = results("costs")
    memory, bank = held["memory"], held["bank"]
    rows = ratios(list(WORKS))
    for key, words in (("training", "a training step"), ("prefill", "reading 512 tokens")):
        cells = [f"{memory[name][key] / 2**20:.0f}" if name in memory else "" for name in METHODS]
        rows.append([f"peak memory of {words} over the loaded base, MiB", *cells])
    cells = [f"{memory[name]['load_seconds']:.2f}" if name in memory else "" for name in METHODS]
    rows.append(["putting a saved adapter onto the loaded base, seconds", *cells])
    parts = [table(["", *METHODS], rows), "One decode step of a batch:", batches(bank)]
    for axis, words in {"rank": "rank", "experts": "experts, 2 active", "context": "context"}.items():
        found = held["growth"][axis]
        columns = list(next(iter(found.values())))
        parts.append(f"By {axis} (the bare base = 1):")
        parts.append(
            table([words, *columns], [[point, *(f"{row[c]:.2f}" for c in columns)] for point, row in found.items()])
        )
    return "\n\n".join([*parts, bounds(held["bounds"])])


def batches(bank: dict[str, Any]) -> str:
    """Milliseconds of one decode step, by what the rows are and who computes them."""
    rows = {
        "transformers, base": ("1", "1 bare row"),
        "transformers, base ": ("4", "4 bare rows"),
        "engine, base": ("4", "bank: 4 bare"),
        "engine, LoRA": ("4", "bank: 4 LoRA"),
        "engine, DoRA": ("4", "bank: 4 DoRA"),
        "engine, MixLoRA": ("4", "bank: 4 MixLoRA"),
        "engine, one each of base, LoRA, DoRA, MixLoRA": ("4", "bank: 4 kinds"),
    }
    one = bank["1 bare row"]["milliseconds"]
    lines = [
        [name.strip(), count, f"{bank[key]['milliseconds']:.0f}", f"{bank[key]['milliseconds'] / one:.2f}"]
        for name, (count, key) in rows.items()
    ]
    return table(["configuration", "rows", "ms per step", "ratio to one row of transformers"], lines)


def bounds(held: dict[str, Any]) -> str:
    """What limits the speed on the machine that was measured."""
    machine = {name: f"{value:.0f}" for name, value in held["machine"].items()}
    base = {name: f"{value:.1f}" for name, value in held["work"]["base"].items()}
    overhead = ", ".join(f"{value:.0f} µs with {name}" for name, value in held["python_microseconds"].items())
    return paragraph(
        f"Limits: this machine reads {machine['GB/s']} GB/s and multiplies {machine['GFLOP/s']} GFLOP/s. "
        f"Reading every weight once takes {base['reading ms']} ms, and the bare base decodes a token in "
        f"{base['decode ms']} ms: the matrix library's products with one row are the limit. Its prefill of 512 tokens "
        f"takes {base['prefill ms']} ms, of which {base['arithmetic ms']} ms are arithmetic at full speed. "
        "Beside the bytes it reads, an adapter costs Python and kernel launches: "
        f"{overhead} per adapted linear; a token passes 210 of them (`bench_bounds.py`)."
    )


def training() -> str:
    """Activations that a training step keeps."""
    held = results("training")
    rows = [
        [name, str(row["activations_mb"]), f"{row['activations_mb'] / held['PEFT LoRA']['activations_mb']:.2f}"]
        for name, row in held.items()
    ]
    head = ["method", "activations kept for the backward pass, MB", "PEFT LoRA = 1"]
    return "Of a batch of eight rows (`python tests/bench/bench_training.py`):\n\n" + table(head, rows)


def push() -> str:
    """How long a push takes, compared with the bare commit."""
    held = results("push")
    words = {
        "trained": "the first push of a freshly trained folder",
        "again": "the second push of it",
        "unrecorded": "a push that must record reference logits",
        "published": "a push of a folder that was pulled",
    }
    rows = [["the bare `create_commit`", f"{held['bare_milliseconds']:.0f}", "1"]]
    for key, name in words.items():
        found = held["push_over_bare_commit"][key]
        rows.append([name, f"{found['milliseconds']:.0f}", f"{found['median']:.2f}"])
    before = paragraph(
        f"Pushes of {held['megabytes']:.0f} MB over loopback, without verification: medians of {held['rounds']} "
        "interleaved rounds (`python tests/bench/bench_push.py`)."
    )
    return before + "\n\n" + table(["", "ms", "ratio"], rows)


def page() -> str:
    """How quickly the page answers, alone and with many visitors."""
    held = results("page")
    many, newcomer = held["many"], held["newcomer"]
    first, every = (newcomer[name]["median"] for name in ("first_token_s", "all_columns_s"))
    return paragraph(
        f"With the shipped adapters on two cores (`python tests/bench/bench_page.py`): the page is usable "
        f"{held['usable_seconds']:.1f} s after the server's start (imports and models aside), the first token of all "
        f"five columns appears {held['first_token_seconds']['median']:.2f} s after the click, and of "
        f"{many['visitors']} visitors who ask at once, {many['served']} are served and none waits longer than "
        f"{many['longest_as_fair_shares']:.2f} times the fair share. They have a first token after "
        f"{many['first_token_median']:.1f} s (the longest: {many['first_token_longest']:.1f}), and one in every "
        f"column after {many['all_columns_median']:.1f} s (the longest: {many['all_columns_longest']:.1f}). Beside "
        f"{newcomer['others']} who ask again and again, one more has a first token after {first:.1f} s, and one in "
        f"every column after {every:.1f} s. All visitors' programs run on the same two cores."
    )


def scheduler() -> str:
    """What workers of other threads cost the scheduler, and what a step of its own gives a newcomer."""
    held = results("scheduler")
    old, new = held["workers"]["with"], held["workers"]["without"]
    newcomer, asking = held["newcomer"], held["asking"]
    first, every = (asking[name] for name in ("first_token_s", "all_columns_s"))
    together, apart = (newcomer[name] for name in ("together", "apart"))
    soon, soon_before, all_, all_before = (
        each[name]["median"] for name in ("first_token_s", "all_columns_s") for each in (apart, together)
    )
    wait = newcomer["apart"]["longest_wait_s"]["median"] / newcomer["together"]["longest_wait_s"]["median"]
    return paragraph(
        f"With the shipped adapters on two cores (`python tests/bench/bench_scheduler.py`): beside {newcomer['rows']} "
        f"rows that generate, the first token of a comparison comes after {soon:.2f} s and one in every column after "
        f"{all_:.2f} s, {soon / soon_before:.2f} and {all_ / all_before:.2f} of the time when its prompts are read "
        f"in a step in which they generate as well, and those rows wait {wait:.2f} of the time for their next token. "
        f"While {asking['others']} visitors ask again and again, one more has the first token after "
        f"{first['median']:.2f} s (the longest of {len(first['all'])}: {max(first['all']):.2f}), one in every column "
        f"after {every['median']:.2f} s ({max(every['all']):.2f}). Without workers in another thread a product of two "
        f"rows with a small weight takes {new['product_us']['median']:.0f} µs instead of "
        f"{old['product_us']['median']:.0f}, and a step of five columns "
        f"{new['step_ms']['median'] / old['step_ms']['median']:.2f} of the time."
    )


def vllm() -> str:
    """What adapters cost in vLLM, in time and memory."""
    held = results("vllm")
    rates, ratios, memory = held["tokens_per_cpu_second"], held["ratios"], held["memory"]
    names = {"base": "the base", "lora": "LoRA", "dora": "DoRA", "mixlora": "MixLoRA"}
    rows = list(rates["base"])
    before = paragraph(
        f"The shipped adapters on the embedded base, float32, one thread, `--enforce-eager`: medians "
        f"of {held['rounds']} interleaved rounds, in CPU time (`tests/bench/bench_vllm.py` says how to run it)."
    )
    speed = table(
        ["decoded tokens per CPU second, rows in the batch:", *rows],
        [[names[method], *(f"{rates[method][count]:.1f}" for count in rows)] for method in rates],
    )
    costs = table(
        ["CPU time, median and quartiles of the rounds, rows in the batch:", *rows],
        [[name, *(f"{cells[n]['median']:.2f} ({cells[n]['lower']:.2f} to {cells[n]['upper']:.2f})" for n in rows)]
         for name, cells in ratios.items()],
    )  # fmt: skip
    kept = table(
        ["adapter", "its file, MB", "memory of each registered one, MB"],
        [[names[method], f"{row['file_mb']:.1f}", f"{row['registered_mb']:.1f}"] for method, row in memory.items()],
    )
    return "\n\n".join([before, speed, costs, kept])


def serving() -> str:
    """Tokens per second of CPU time by the number of concurrent requests."""
    before = paragraph(
        "Tokens per second of CPU time on the embedded base in float32, one thread, by the number of requests at once "
        "(`python tests/bench/bench_serving.py --vllm FOLDER`, with the environment of `.ci/vllm FOLDER`; medians of "
        "interleaved rounds, one round with 64; ranges and wall times in tests/bench/serving.json):"
    )
    return before + "\n\n" + _by_clients("serving")


def serving_llama() -> str:
    """The same beside llama.cpp."""
    before = paragraph(
        "Beside llama.cpp, in a run of its own (`python tests/bench/bench_serving.py --llama FOLDER`, with the "
        "environment of `.ci/llama FOLDER`; ranges and wall times in tests/bench/serving_llama.json):"
    )
    return before + "\n\n" + _by_clients("serving_llama")


def _by_clients(name: str) -> str:
    held = results(name)
    clients = sorted({count for each in held.values() for count in each}, key=int)
    rows = [
        [work, *(f"{each[count]['cpu_rate']:.1f}" if count in each else "" for count in clients)]
        for work, each in held.items()
    ]
    return table(["", *clients], rows)


def low_bits() -> str:
    """Starts on quantized bases."""
    return f"{low_bit.report()}\n\n{low_bit_fits.report()}"


def decode() -> str:
    """Milliseconds of one decode step, by the dtype of the base."""
    held = results("decode")
    before = paragraph(
        "One decode step in ms, two threads, medians of nine interleaved rounds for each dtype, and in brackets the "
        "ratio to one row of the bare base in the same column (`python tests/bench/bench_decode.py --threads 2 "
        "--rounds 9 --dtype DTYPE`). Reading is the sum of as many bytes as the base has: no step can take less. The "
        "products are those of the base's linears and nothing else. The last column is of another processor, without "
        "AVX-512, and of newer code."
    )
    last = [*held.values()][-1]
    rows = [
        [name, *(f"{each[name]['milliseconds']:.0f} ({each[name]['ratio']:.2f})" if name in each else ""
                 for each in held.values())]
        for name in last
    ]  # fmt: skip
    return before + "\n\n" + table(["", *held], rows)


def products() -> str:
    """Milliseconds of all products of the base, by the number of rows and the way."""
    held = results("products")
    before = paragraph(
        "All products of the embedded base in float32, in ms, on the processor without AVX-512 (`python "
        f"tests/bench/bench_products.py`). Reading the weights takes {held['reading']:.0f} ms, and the arithmetic "
        "what it takes at the speed of a product of two large matrices:"
    )
    names = {"arithmetic": "arithmetic", "linear": "F.linear", "transposed": "W xᵀ", "oneDNN": "oneDNN",
             "packed": "oneDNN, weights copied into its layout"}  # fmt: skip
    rows = [[name, *(f"{row[key]:.0f}" for row in held["rows"].values())] for key, name in names.items()]
    return before + "\n\n" + table(["rows", *held["rows"]], rows)


def precision() -> str:
    """What the dtype of the base changes in answers."""
    held = results("precision")
    items = 4 * held["items"]
    before = paragraph(
        f"The shipped adapters on {items} test items, each of which can change between right and wrong, and the "
        "perplexity of general text (`python tests/bench/bench_precision.py`):"
    )
    adapters = [name for name in held["dtypes"]["float32"]["models"] if name != "base"]
    rows = []
    for dtype, measured in held["dtypes"].items():
        models = measured["models"]
        cells = [f"{models[name]['exact_match']:.1f} ({models[name]['changed']})" for name in adapters]
        lengths = [f"{models[name]['perplexity']:.2f}" for name in ("base", adapters[-1])]
        rows.append([dtype, f"{measured['megabytes']:.0f}", *cells, *lengths])
    names = [name.removeprefix("smollm2-135m-") for name in adapters]
    head = ["base in", "MB", *(f"{name}, % right (changed)" for name in names)]
    return before + "\n\n" + table([*head, "perplexity of the base", f"of {names[-1]}"], rows)


def paragraph(text: str) -> str:
    """Wrap a paragraph."""
    return "\n".join(textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False))


BLOCKS: dict[str, Callable[[], str]] = {
    "choice": choosing.report,
    "chosen-answers": choosing.answers,
    "conflicts": interference.report,
    "continued": train_on_report.report,
    "costs": costs,
    "decode": decode,
    "products": products,
    "evidence": lambda: report.section(Store()),
    "federated": federated.report,
    "long": long_report.report,
    "low-bit": low_bits,
    "page": page,
    "scheduler": scheduler,
    "precision": precision,
    "push": push,
    "routers": routing_report.report,
    "serving": serving,
    "serving-llama": serving_llama,
    "summary": summary,
    "training": training,
    "vllm": vllm,
}
"""Name of a block -> what renders it."""
