"""Every benchmark in one command: the numbers as one JSON file, and the picture in the README.

    python tests/bench/bench_all.py [--only methods bank] [--rounds 5]

Writes tests/bench/costs.json (parts that are not run keep what they had), tests/bench/costs.png and, between two marks,
the tables of the README. Takes about a quarter of an hour on two cores; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

HERE = Path(__file__).parent
PARTS = ("bounds", "methods", "memory", "bank", "pool", "growth")
RESULTS, PICTURE, README = HERE / "costs.json", HERE / "costs.png", HERE.parent.parent / "README.md"
BEGIN, END = "<!-- costs: written by tests/bench/bench_all.py -->", "<!-- end of costs -->"
COLOURS = {
    "LoRA": "#3a7d44",
    "DoRA": "#2d5fa6",
    "MixLoRA": "#8a3fa0",
    "PEFT LoRA": "#a9c9ae",
    "PEFT DoRA": "#a9bfdd",
    "mixlora": "#d3b3dc",
}


def run(part: str, rounds: int | None) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-W", "ignore", str(HERE / f"bench_{part}.py"), "--json", str(out)]
        if rounds and part != "memory":
            command += ["--rounds", str(rounds)]
        subprocess.run(command, check=True)
        return json.loads(out.read_text(encoding="utf-8"))


def draw(results: dict) -> None:
    """Prefill, decode and a training step of each method, rows of a batch; below, how the cost of decoding grows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(13, 6.4), constrained_layout=True)
    draw_methods(axes[0], results["methods"])
    draw_batch(axes[0, 3], results["bank"])
    draw_growth(axes[1], results["growth"])
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def draw_methods(axes, methods: dict) -> None:
    titles = {
        "prefill": "prefill, 512 tokens\n(bare base = 1)",
        "decode": "decoding one token\n(bare base = 1)",
        "training": "training step\n(PEFT's LoRA = 1)",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=False):
        rows = {name: row for name, row in methods[key].items() if name in COLOURS}
        ratios = [row["ratio"] for row in rows.values()]
        spread = [
            [row["ratio"] - row["low"] for row in rows.values()],
            [row["high"] - row["ratio"] for row in rows.values()],
        ]
        bars = axis.barh(list(rows), ratios, color=[COLOURS[name] for name in rows], xerr=spread, ecolor="#555")
        axis.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=4, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.set_xlim(0, max(ratios) * 1.25)
        axis.axvline(1, color="#888", linewidth=0.8)
        axis.invert_yaxis()


def draw_batch(axis, bank: dict) -> None:
    shown = {
        "1 bare row": "transformers, 1 row",
        "4 bare rows": "transformers, 4 rows",
        "bank: 4 bare": "bank, 4 rows",
        "bank: 4 kinds": "bank, base + LoRA +\nDoRA + MixLoRA",
    }
    times = [bank[name]["milliseconds"] for name in shown]
    bars = axis.barh(list(shown.values()), times, color=["#bbb", "#bbb", "#777", "#8a3fa0"])
    axis.bar_label(bars, [f"{value:.0f} ms" for value in times], padding=4, fontsize=8)
    axis.set_title("one decode step of a batch", fontsize=10)
    axis.set_xlim(0, max(times) * 1.25)
    axis.invert_yaxis()


def draw_growth(axes, growth: dict) -> None:
    titles = {
        "rank": "decoding, by rank",
        "experts": "decoding, by experts (2 active)",
        "context": "decoding, by context",
        "rows": "a step of the bank, by rows\n(bare rows elsewhere = 1)",
    }
    greys = {"bank, bare rows": "#777", "bank, four kinds": "#8a3fa0"}
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        points = list(growth[key])
        for name in growth[key][points[0]]:
            if name.endswith("prefill"):
                continue
            colour = greys.get(name) or COLOURS[name.removesuffix(" decode")]
            values = [growth[key][point][name] for point in points]
            axis.plot(points, values, marker="o", markersize=4, color=colour, label=name.removesuffix(" decode"))
        axis.axhline(1, color="#888", linewidth=0.8)
        axis.set_ylim(bottom=0)
        axis.set_title(title, fontsize=10)
        axis.legend(fontsize=7, frameon=False)


def tables(results: dict) -> str:
    """What the README says of the costs: every number is one of `results`."""
    names = ("LoRA", "DoRA", "MixLoRA", "PEFT LoRA", "PEFT DoRA", "mixlora")
    works = {
        "prefill": "prefill of 512 tokens, the bare base = 1",
        "decode": "decoding one token, the bare base = 1",
        "training": "training step, PEFT LoRA = 1",
        "training with dropout": "training step, dropout 0.05, PEFT LoRA = 1",
    }
    lines = ["| | LoRA | DoRA | MixLoRA | PEFT LoRA | PEFT DoRA | `mixlora` |", "| --- |" + " ---: |" * 6]
    for work, words in works.items():
        measured = results["methods"][work]
        unit = "PEFT LoRA" if work.startswith("training") else None
        cells = [
            "1" if name == unit else f"{measured[name]['ratio']:.2f}" if name in measured else "" for name in names
        ]
        lines.append(f"| {words} | " + " | ".join(cells) + " |")
    memory = results["memory"]
    for key, words in (("training", "a training step"), ("prefill", "reading 512 tokens")):
        cells = [f"{memory[name][key] / 2**20:.0f}" if name in memory else "" for name in names]
        lines.append(f"| peak memory of {words} over the loaded base, MiB | " + " | ".join(cells) + " |")
    cells = [f"{memory[name]['load_seconds']:.2f}" if name in memory else "" for name in names]
    lines.append("| putting a saved adapter onto the loaded base, seconds | " + " | ".join(cells) + " |")

    bank = {name: row["milliseconds"] for name, row in results["bank"].items()}
    lines += [
        "",
        *paragraph(
            "Rows of a batch, one decode step: four rows of the bare base take",
            f"{bank['4 bare rows'] / bank['1 bare row']:.2f} times one row in transformers,",
            f"{bank['bank: 4 bare'] / bank['1 bare row']:.2f} times in the bank, which multiplies few rows the other",
            "way round (W xᵀ). One row each of base, LoRA, DoRA and MixLoRA takes",
            f"{bank['bank: 4 kinds'] / bank['4 bare rows']:.2f} times four bare rows in transformers,",
            f"{bank['bank: 4 kinds'] / bank['bank: 4 bare']:.2f} times four bare rows in the bank.",
        ),
        "",
        "How the cost grows (a bare base, or as many bare rows in transformers, = 1):",
        "",
    ]
    for axis, words in {"rank": "rank", "experts": "experts, 2 active", "context": "context", "rows": "rows"}.items():
        found = results["growth"][axis]
        columns = list(next(iter(found.values())))
        lines += [f"| {words} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        lines += [
            f"| {point} | " + " | ".join(f"{row[column]:.2f}" for column in columns) + " |"
            for point, row in found.items()
        ]
        lines.append("")
    machine = {name: f"{value:.0f}" for name, value in results["bounds"]["machine"].items()}
    base = {name: f"{value:.1f}" for name, value in results["bounds"]["work"]["base"].items()}
    microseconds = results["bounds"]["python_microseconds"]
    lines += paragraph(
        f"What bounds it: this machine reads {machine['GB/s']} GB/s and multiplies {machine['GFLOP/s']} GFLOP/s.",
        f"Reading every weight once would take {base['reading ms']} ms, and the bare base decodes a token in",
        f"{base['decode ms']} ms: it is bound by the matrix library's products with one row. Its prefill",
        f"of 512 tokens takes {base['prefill ms']} ms, {base['arithmetic ms']} of them at full",
        "arithmetic speed. Beside what it reads, an adapter costs Python and the start of small kernels:",
        ", ".join(f"{value:.0f} µs with {name}" for name, value in microseconds.items()),
        "per adapted linear, of which a token meets 210 (`bench_bounds.py`).",
    )
    return "\n".join(lines)


def paragraph(*parts: str) -> list[str]:
    return textwrap.wrap(" ".join(parts), 120, break_long_words=False, break_on_hyphens=False)


def with_tables(readme: str, results: dict) -> str:
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n\n{tables(results)}\n\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="how often each is measured; default: as each benchmark has it")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for part in arguments.only:
        print(f"\n== {part}", flush=True)
        results[part] = run(part, arguments.rounds)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results)
    README.write_text(with_tables(README.read_text(encoding="utf-8"), results), encoding="utf-8")


if __name__ == "__main__":
    main()
